"""F10, F11: what an adapter costs where the layers are small, and where they are called without gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .compiling import operations
from .measuring import interleaved
from .report import COUNT, SECONDS, Found, Row, absolute, ratio
from .setting import LIBRARIES, LORA, Setting, adapted, llama, tokens

WIDTH = 64
ENOUGH = 0.02
"""Seconds that a time is made of, at least: single calls are too short for the clock."""


class HandWritten(nn.Module):
    """y + s B A x around a linear layer, as anybody would write it: what a LoRA costs at least in eager mode."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.linear, self.scale = linear, 1.0
        self.a = nn.Linear(linear.in_features, r, bias=False)
        self.b = nn.Linear(r, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * self.b(self.a(x))


class Chain(nn.Module):
    """Layers in a row."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def chain(setting: Setting, wrap: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> Chain:
    """Many small linear layers."""
    torch.manual_seed(0)
    linears = [nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(setting.size(200, 3))]
    return Chain([wrap(linear) for linear in linears]).to(setting.device)


def chain_with_lora(library: str, setting: Setting) -> Any:
    module = LIBRARIES[library]
    lora = module.LoraConfig(r=8, lora_alpha=8, target_modules=r"layers\.\d+", init_lora_weights=False)
    return module.get_peft_model(chain(setting), lora)


def switch_off(library: str, view: Any) -> None:
    """From now on no adapter is active."""
    if library == "peft":
        view.base_model.disable_adapter_layers()
    else:
        view.set_adapter(None)


def per_site(setting: Setting) -> list[Row]:
    x = torch.randn(8, WIDTH, device=setting.device)
    views = {library: chain_with_lora(library, setting) for library in LIBRARIES}
    plain, hand = chain(setting), chain(setting, lambda linear: HandWritten(linear, 8))

    def forward(model: nn.Module) -> Callable[[], Any]:
        return lambda: model(x)

    def step(model: nn.Module) -> Callable[[], Any]:
        return lambda: model(x).sum().backward()

    active = {"hand": hand, **views}
    steps = interleaved({name: step(model) for name, model in active.items()}, setting, ENOUGH)
    with torch.no_grad():
        forwards = interleaved({name: forward(model) for name, model in active.items()}, setting, ENOUGH)
        for library, view in views.items():
            switch_off(library, view)
        idle = interleaved({n: forward(m) for n, m in {"plain": plain, **views}.items()}, setting, ENOUGH)
        inference = {name: [operations(model, x)] for name, model in {"plain": plain, **views}.items()}
    training = {name: [operations(model, x)] for name, model in {"plain": plain, **views}.items()}
    sites = len(plain.layers)
    return [
        absolute("F10", "inactive adapter, per site, over the plain layer", more(idle, "plain", sites), SECONDS, 1e-6),
        absolute("F10", "the same, compiled without gradients: operations", more(inference, "plain", 1), COUNT, 0),
        absolute("F10", "the same, compiled with gradients: operations", more(training, "plain", 1), COUNT, 0),
        absolute("F10", "one LoRA, per site, over a hand-written one", more(forwards, "hand", sites), SECONDS, 10e-6),
        absolute("F10", "the same, forward and backward", more(steps, "hand", sites), SECONDS, 10e-6),
    ]


def more(found: Found, than: str, sites: int) -> Found:
    """What each takes more than another, per site; and what that takes per site itself, as "base"."""
    base = [value / sites for value in found[than]]
    over = {name: [(a - b) / sites for a, b in zip(found[name], found[than], strict=True)] for name in LIBRARIES}
    return {"base": base, **over}


def latency(setting: Setting) -> list[Row]:
    """Inference on one row: of a bottleneck, and of a LoRA that is merged."""
    base = llama(setting).eval()
    adapter = adapted("coadapt", llama(setting), "BottleneckConfig", bottleneck_size=64).eval()
    merged = {library: adapted(library, llama(setting), "LoraConfig", **LORA).eval() for library in LIBRARIES}
    for view in merged.values():
        view.merge_adapter()
    rows: list[Row] = []
    for length in (1, setting.size(128, 3)):
        ids = tokens(setting, 1, length)
        models = {"base": base, "coadapt": adapter, **{f"merged {name}": view for name, view in merged.items()}}
        with torch.no_grad():
            seconds = interleaved({n: lambda m=m, ids=ids: m(ids) for n, m in models.items()}, setting, ENOUGH)
        of_merged = {"base": seconds["base"], **{name: seconds[f"merged {name}"] for name in merged}}
        what = f"1 x {length} token{'s' * (length > 1)} / base"
        rows += [ratio("F11", f"bottleneck (64), forward of {what}", seconds, 1.05, base="base")]
        rows += [ratio("F11", f"merged LoRA, forward of {what}", of_merged, 1.00, base="base")]
    return rows
