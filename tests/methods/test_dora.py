"""DoRA: the paper's formula, on top of what stands below it, and several of them merged."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from coadapt import LoraConfig, PeftModel, get_peft_model
from coadapt.core.layer import Layer
from models import gpt2, ids, logits, stir


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def dora(**options: int) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["layer"], init_lora_weights=False, **options)


def by_hand(weight: Tensor, view: PeftModel, name: str) -> Tensor:
    p = {n.rpartition("dora.")[2]: v.detach() for n, v in view.get_adapter(name).named_parameters()}
    changed = weight + 2 * p["change.B"] @ p["change.A"]
    return p["m"][:, None] * changed / changed.norm(dim=1, keepdim=True)


def test_the_formula_and_the_start() -> None:
    torch.manual_seed(0)
    base, x = One(), torch.randn(3, 6)
    start = LoraConfig(r=2, use_dora=True, target_modules=["layer"])
    torch.testing.assert_close(get_peft_model(One(), start)(x).shape, torch.Size([3, 5]))
    view = get_peft_model(base, start, adapter_name="s")
    torch.testing.assert_close(view(x), base(x))
    torch.testing.assert_close(view.get_adapter("s").parts[0].method.m, base.layer.weight.norm(dim=1))  # type: ignore[attr-defined]
    view.add_adapter("a", dora())
    stir(view.get_adapter("a"), by=0.3)
    expected = nn.functional.linear(x, by_hand(base.layer.weight, view, "a"), base.layer.bias)
    torch.testing.assert_close(view(x, adapters="a"), expected)


def test_in_a_seq_the_norm_is_of_the_weight_below() -> None:
    torch.manual_seed(0)
    base, x = One(), torch.randn(3, 6)
    view = PeftModel(base)
    view.add_adapter("lora", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    view.add_adapter("a", dora())
    view.add_adapter("b", dora())
    stir(view.adapters, by=0.3)
    lora = view.get_adapter("lora").parts[0].method.merge(base.layer.weight).detach()  # type: ignore[attr-defined]
    below = by_hand(lora, view, "a")
    for nodes, weight in (("lora >> a", below), ("lora >> a >> b", by_hand(below, view, "b"))):
        expected = nn.functional.linear(x, weight, base.layer.bias)
        torch.testing.assert_close(view(x, adapters=nodes), expected)
        view.set_adapter(nodes)
        view.merge_adapter()
        torch.testing.assert_close(base.layer.weight, weight)
        view.unmerge_adapter()
    view.set_adapter("a + 0.5*b")
    expected = view(x)
    view.merge_adapter()
    torch.testing.assert_close(view(x), expected)


def test_no_gradient_goes_through_the_norm() -> None:
    """Section 4.3 of the paper: the gradient of B is that of a LoRA times m / norm."""
    torch.manual_seed(0)
    base, x = One(), torch.randn(3, 6)
    view = get_peft_model(base, dora(), adapter_name="a")
    stir(view.adapters, by=0.3)
    view(x).sum().backward()
    p = {n.rpartition("dora.")[2]: v for n, v in view.get_adapter("a").named_parameters()}
    norm = (base.layer.weight + 2 * p["change.B"] @ p["change.A"]).norm(dim=1).detach()
    length = (p["m"] / norm).detach()
    expected = 2 * length[:, None] * (x @ p["change.A"].detach().mT).sum(0).expand(5, -1)
    torch.testing.assert_close(p["change.B"].grad, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_beside_a_lora_row_by_row(seed: int) -> None:
    view = get_peft_model(gpt2(), LoraConfig(r=2, use_dora=True), adapter_name="a")
    view.add_adapter("b", LoraConfig(r=3))
    stir(view.adapters, seed=seed)
    view.eval()
    rows = logits(view, adapter_names=["a", "b", ["a", "b"]])
    for i, one in enumerate(["a", "b", ["a", "b"]]):
        torch.testing.assert_close(rows[i], logits(view, ids(), adapters=one)[i], rtol=1e-5, atol=1e-6)


LAYERS = [nn.Linear(40, 30), Conv1D(30, 40), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3, groups=2), nn.Embedding(50, 30)]
WITHIN = {torch.float64: 1e-13, torch.float32: 4e-7, torch.bfloat16: 2e-3, torch.float16: 2.4e-4}
"""In half precision a quarter of a step of the base, here where B A is as large as W."""


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_norms_without_the_matrix_are_those_of_the_matrix(layer: nn.Module, dtype: torch.dtype) -> None:
    """|w|^2 + 2 s (w A^T) b + s^2 b A A^T b, row by row, against the norms of W + s B A in float64."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": copy.deepcopy(layer)}).to(dtype)
    method: Any = get_peft_model(base, dora(), adapter_name="a").get_adapter("a").parts[0].method
    stir(method, by=0.3)
    weight, (a, b, s) = Layer(base["layer"]).weight().double().flatten(1), method.change.factors()
    expected = (weight + s * b.double() @ a.double().flatten(1)).norm(dim=1)
    found = method.norms(Layer(base["layer"]))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=WITHIN[dtype], atol=0)


def test_norms_follow_the_weight() -> None:
    """What is kept of the base's weight is worked out anew where the weight has changed, in whichever way."""
    torch.manual_seed(0)
    base, x = One(), torch.randn(3, 6)
    view = get_peft_model(base, dora(), adapter_name="a")
    stir(view.adapters, by=0.3)

    def follows() -> None:
        expected = nn.functional.linear(x, by_hand(base.layer.weight, view, "a"), base.layer.bias)
        torch.testing.assert_close(view(x), expected)

    with torch.inference_mode():
        follows()
    follows()
    view(x).sum().backward()  # with what was kept in inference mode
    with torch.no_grad():
        base.layer.weight.mul_(2)
    follows()
    base.load_state_dict({k: v + 1 for k, v in base.state_dict().items()})
    follows()
    base.layer.weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)
    follows()
    base.layer.weight.data = torch.randn(5, 6)
    follows()
    assert torch.equal(copy.deepcopy(view)(x), view(x))


class Sizes(TorchDispatchMode):
    """Context: notes how large the tensors are that operations make, of floats and by themselves, not as views."""

    def __enter__(self) -> Any:
        self.found: set[int] = set()
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in held:
                self.found.add(t.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_the_weights_size_is_made(dtype: torch.dtype) -> None:
    base = nn.ModuleDict({"layer": nn.Linear(60, 50)}).to(dtype)
    base.forward = lambda x: base["layer"](x)  # type: ignore[method-assign]
    view, x = get_peft_model(base, dora(), adapter_name="a"), torch.randn(4, 60, dtype=dtype)
    with Sizes() as sizes:
        view(x).sum().backward()
    assert max(sizes.found) == 4 * 50, "the output"
    with Sizes() as sizes:
        view(x, adapters="a >> a").sum().backward()
    assert max(sizes.found) == 60 * 50, "the upper one reads the weight with the lower one"
