"""DoRA: the paper's formula, on top of what stands below it, and several of them merged."""

import pytest
import torch
from torch import Tensor, nn

from coadapt import LoraConfig, PeftModel, get_peft_model
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
