"""forward(x, base) == base.apply(x, merge(W), merge_bias(b)), for every weight method on every kind of layer."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from coadapt import LoraConfig, PeftModel
from coadapt.core.method import METHODS, WeightMethod
from coadapt.methods.lora import LoRA
from laws.setting import DIVIDES, EVERY, ONLY_IN_TRAINING, close, far, stir
from models import Holder

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "linear-vector": (lambda: nn.Linear(6, 5), (6,)),
    "linear-even": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "linear-deep": (lambda: nn.Linear(6, 5), (2, 2, 3, 6)),
    "gpt2-conv1d": (lambda: Conv1D(5, 6), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv1d-circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "conv1d-depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4, padding=2, dilation=2), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, bias=False), (2, 4, 7, 6)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 4)),
    "conv3d-groups": (lambda: nn.Conv3d(4, 6, 3, groups=2, padding="same"), (2, 4, 3, 3, 4)),
    "embedding": (lambda: nn.Embedding(9, 5), (2, 3)),
    "embedding-padding": (lambda: nn.Embedding(9, 5, padding_idx=0), (2, 3)),
    "embedding-even": (lambda: nn.Embedding(8, 4), (2, 3)),
    "norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
}
C3A_FITS = (
    "linear-even",
    "embedding-even",
    "conv1d",
    "conv1d-circular",
    "conv1d-groups",
    "conv2d",
    "conv3d",
    "conv2d-groups",
    "conv3d-groups",
)
KIND = {"gpt2-conv1d": "linear"}
DIVIDE = {
    "bat": ((2, 2), "must divide"),
    "boft-butterfly": ((1, 4), "must be a multiple"),
    "miss-mini": ((2, 1), "a divisor of the second"),
    "oft-blocks": ((1, 2), "does not divide"),
    "road": ((2, 1), "does not divide"),
    "road-1": ((2, 1), "does not divide"),
}
"""What must divide the outputs and the inputs of a layer, and what is said where it does not."""
DRAWS = ("velora", "poly", "pvera", "monteclora")
"""Cases whose training draws numbers, or approximates: compared in evaluation."""
ELSEWHERE = ("lora-experts", "oft-experts", "vera-experts", "adalora-experts", "lora-tied", "lora-tokens")
"""Cases that need a whole model."""
WEIGHTS = [
    name for name, config in EVERY.items() if issubclass(METHODS[config.method], WeightMethod) and name not in ELSEWHERE
]


def refusal(case: str, kind: str) -> str | None:
    """What a method says to a kind of layer that it has no place in."""
    method: Any = METHODS[EVERY[case].method]
    if KIND.get(kind, kind.partition("-")[0].rstrip("123d")) not in method.kinds:
        return "adapts layers of these kinds"
    if case == "lora-own-bias" and kind.startswith("embedding"):
        return "LoraBias adapts layers of these kinds"
    if case in ("bitfit", "beft") and kind.startswith("embedding"):
        return "bias"
    if case == "c3a" and kind not in C3A_FITS:
        return "block_size=2 does not divide"
    sizes, said = DIVIDE.get(case, (None, ""))
    if sizes is not None:
        weight = LAYERS[kind][0]().weight
        outputs, *inner = weight.mT.shape if kind.startswith(("embedding", "gpt2")) else weight.shape
        features = outputs if kind.startswith("embedding") and case.startswith(("oft", "boft")) else math.prod(inner)
        if outputs % sizes[0] or features % sizes[1]:
            return said
    return None


def prepared(kind: str, case: str) -> tuple[PeftModel, Tensor]:
    """A view over one layer, and an input for it; skips what a method refuses."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    x = torch.randint(0, 8, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    options = {k: v for k, v in EVERY[case].to_dict().items() if k not in ("target_modules", "peft_type")}
    if getattr(layer, "bias", None) is None and options.get("bias", "none") != "none":
        pytest.skip("there is no bias")
    if case == "tokens":
        options["token_indices"] = [1, 4]
        x.view(-1)[:2] = torch.tensor([1, 4]) if isinstance(layer, nn.Embedding) else 1.0
    if case == "bd-lora":
        options["use_bdlora"]["target_modules_bd_a"] = ["layer"]
    name, weight = DIVIDES.get(case), layer.get_parameter("weight")
    if name is not None and any(size % options[name] for size in (len(weight), weight.numel() // len(weight))):
        options[name] = 1
    if why := refusal(case, kind):
        with pytest.raises(ValueError, match=why):
            PeftModel(Holder(layer), type(EVERY[case])(target_modules=["layer"], **options))
        pytest.skip(f"refused: {why}")
    view = PeftModel(Holder(layer), type(EVERY[case])(target_modules=["layer"], **options))
    stir(view.adapters, by=0.3)
    return view.eval(), x  # some draw while they train


def by_definition(view: PeftModel, layer: Any, x: Tensor) -> Tensor:
    """The layer's own forward, with what `merge` and `merge_bias` say in the place of its parameters."""
    stored = layer.weight.detach()
    flip = isinstance(layer, nn.Embedding | Conv1D)
    weight, bias = (stored.mT if flip else stored), layer.bias if hasattr(layer, "bias") else None
    for part in view.get_adapter("default").parts:
        method: Any = part.method
        below: Any = SimpleNamespace(weight=lambda weight=weight: weight, bias=bias)
        weight, bias = method.merge(weight), method.new_bias(below)
    values = {"weight": (weight.mT if flip else weight), **({} if bias is None else {"bias": bias})}
    if bias is not None and layer.bias is None:
        y = functional_call(layer, {"weight": values["weight"]}, (x,))
        return y + (bias.view(-1, *[1] * (y.dim() - 2)) if "Conv" in type(layer).__name__ else bias)
    return functional_call(layer, values, (x,))


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_follows_from_merge(kind: str, case: str) -> None:
    view, x = prepared(kind, case)
    layer: Any = view.base.layer
    plain, weight = view.base(x), layer.weight.clone()
    expected = by_definition(view, layer, x)
    far(view(x), plain)
    close(view(x), expected)
    general = PeftModel.__call__(view, x, adapters="default >> default")  # not the fused path
    twice = view(x, adapters="default + default")
    if case == "lora":
        close(general, twice)
    assert torch.equal(layer.weight, weight), "merge is pure"
    view.merge_adapter()
    close(view.base(x), expected)
    assert torch.equal(view(x), view.base(x)), "what is merged is not applied again"
    view.unmerge_adapter()
    assert torch.equal(view.base(x), plain)


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_follow_from_merge(kind: str, case: str) -> None:
    """What is written for speed differentiates as the definition does, its input included."""
    view, x = prepared(kind, case)
    layer: Any = view.base.layer
    x = x.requires_grad_() if x.is_floating_point() else x.clamp(min=1)  # the padding's row learns nothing either way
    parameters = [p for n, p in view.adapters.named_parameters() if not n.endswith(ONLY_IN_TRAINING)]
    inputs = [*parameters, *([x] if x.requires_grad else [])]
    view.train(case not in DRAWS)
    y = view(x)
    chosen = torch.randn(y.shape)
    fast = torch.autograd.grad((y * chosen).sum(), inputs)
    slow = torch.autograd.grad((by_definition(view, layer, x) * chosen).sum(), inputs)
    for one, other in zip(fast, slow, strict=True):
        close(one, other, 2e-6)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d-groups"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_is_the_papers_formula(kind: str, rslora: bool) -> None:
    """W' = W + alpha / r B A, added up here rank by rank and entry by entry."""
    make, _shape = LAYERS[kind]
    view = PeftModel(Holder(make()), LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=["layer"]))
    stir(view.adapters)
    method: Any = view.get_adapter("default").parts[0].method
    assert isinstance(method, LoRA)
    weight: Tensor = view.base.layer.weight.detach()
    scale = 5 / 3**0.5 if rslora else 5 / 3
    expected = weight.clone()
    for o in range(weight.shape[0]):
        for r in range(3):
            expected[o] += scale * method.B[o, r].detach() * method.A[r].detach()
    close(method.merge(weight), expected)
