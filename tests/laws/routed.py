"""Views with routers, for the laws of routers."""

from typing import Any

import torch
from torch import Tensor, nn

from coadapt import (
    Arrow,
    BottleneckConfig,
    Fusion,
    LoraConfig,
    PeftModel,
    PooledRouter,
    Sum,
    TaskRouter,
    TokenRouter,
)
from laws.setting import (
    MAKE,
    attach,
    stir,
)


def stirred(view: PeftModel, by: float = 0.5) -> PeftModel:
    """Routers that do depend on what goes in."""
    stir(view.gates, seed=5, by=by)
    return view


def routed(model: str, router: Any, *cases: str, base: Any = None) -> PeftModel:
    view = attach(MAKE[model]() if base is None else base, model, *cases, by=0.3)
    view.set_adapter(Sum(*"abcd"[: len(cases)], weights=router))
    return stirred(view)


class OneLayer(nn.Module):
    """One linear layer, so that what a site reads is the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_layer(*configs: Any) -> tuple[PeftModel, Tensor, Tensor, list[Tensor]]:
    """A view, an input (B, T, I), what the base makes of it, and the change that each adapter makes."""
    view = PeftModel(OneLayer())
    for name, config in zip("abc", configs, strict=False):
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=ord(name), by=0.5)
    torch.manual_seed(1)
    x = torch.randn(3, 4, 6)
    y = view.base(x).detach()
    return view, x, y, [(view(x, adapters=n) - y).detach() for n in "abc"[: len(configs)]]


LORA = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
SERIAL = BottleneckConfig(bottleneck_size=3, target_modules=["linear"])


ROUTERS: dict[str, Any] = {
    "token": lambda: TokenRouter(),
    "top-1": lambda: TokenRouter(top_k=1),
    "pooled": lambda: PooledRouter(),
    "sigmoid": lambda: PooledRouter(activation="sigmoid"),
    "task": lambda: TaskRouter(2),
    "arrow": lambda: Arrow(),
    "fusion": lambda: Fusion(dim=4),
}
CASES = {
    "arrow": ("lora", "lora"),
    "fusion": ("lora-all-linear", "bottleneck"),
    "sigmoid": ("lora", "prefix", "bottleneck"),
}


def made(kind: str, model: str, base: Any = None) -> PeftModel:
    """A view with a router of this kind; UniPELT's over a LoRA, a prefix and a bottleneck."""
    cases = CASES.get(kind, ("lora", "bottleneck") if model == "bloom" else ("lora", "prefix", "lora"))
    if model == "bloom":
        cases = tuple("lora" if c == "prefix" else c for c in cases)
    return routed(model, ROUTERS[kind](), *cases, base=base)


def told(kind: str, tasks: list[int]) -> dict[str, Any]:
    return {"task_ids": tasks} if kind == "task" else {}
