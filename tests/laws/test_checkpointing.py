"""Gradient checkpointing changes no gradient: both kinds, enabled before or after, with adapters switched between."""

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import coadapt
from coadapt import Learned, LoraConfig, PeftModel, Sum
from laws.setting import MAKE, attach, fits, gradients, ids, logits, loss, pairs, recompute, same_gradients

CAN = tuple(model for model in MAKE if model not in ("plain", "conv"))
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])


def made(model: str, when: str, reentrant: bool, *cases: str) -> PeftModel:
    """A view in training mode whose base checkpoints: since before the adapters, since after, or not at all."""
    base = MAKE[model]()
    if when == "before":
        recompute(base, reentrant)
    view = attach(base, model, *cases)
    if when == "after":
        recompute(view, reentrant)
    # Without a cache the forward rounds otherwise, and a ReLU can tip over: T5's is compared in double precision. (Not
    # all can: eager softmax in fp32 makes -inf of a double's mask, and NaN of padding; Mixtral multiplies no doubles.)
    return view.double().train() if model == "t5" and {"p-tuning", "pvera"} & set(cases) else view.train()


def switched(view: PeftModel) -> dict[str, Tensor | None]:
    """Two forwards with different adapters, then a third that is active while the backward runs."""
    torch.manual_seed(0)  # of what draws while it trains
    view.set_adapter("a")
    one = loss(view)
    view.set_adapter("b")
    two = loss(view, ids(seed=1))
    three = loss(view, ids(seed=2), adapter_names=["a", None, "b >> a"])
    view.set_adapter(None)
    (one + two + three).backward()
    return gradients(view)


@REENTRANT
@pytest.mark.parametrize("when", ["before", "after"])
@pairs(0, models=CAN)
def test_gradients_are_those_without(case: str, model: str, when: str, reentrant: bool) -> None:
    other = next(c for c in ("lora", "bottleneck") if c != case and fits(c, model))
    same_gradients(
        switched(made(model, when, reentrant, case, other)), switched(made(model, "never", reentrant, case, other))
    )


HALF = pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])


@REENTRANT
@HALF
@pytest.mark.parametrize(
    ("case", "model"), [("lora", "llama"), ("bottleneck", "t5"), ("prefix", "gpt2"), ("prompt", "bart")]
)
def test_half_precision_recomputes_to_the_same(case: str, model: str, autocast: bool, reentrant: bool) -> None:
    """A base in bf16 with adapters in fp32, and autocast: as far as bf16 carries, since sums go in another order."""
    other = next(c for c in ("lora", "bottleneck") if c != case and fits(c, model))
    found: list[dict[str, Tensor | None]] = []
    for when in ("after", "never"):
        view = made(model, when, reentrant, case, other).float()
        if not autocast:
            view.base.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            one, two = loss(view, adapters="a"), loss(view, ids(seed=1), adapters="b")
            three = loss(view, ids(seed=2), adapter_names=["a", None, "b >> a"])
        (one + two + three).backward()
        found.append(gradients(view))
        assert all(g is not None and g.dtype == torch.float32 for g in found[-1].values())
    for name in "ab":
        with_it, without = (
            torch.cat([g.flatten() for n, g in of.items() if g is not None and n.startswith(f"adapters.{name}.")])
            for of in found
        )
        allowed = 0.06 if model == "t5" else 0.03  # whose ReLU tips over at a rounding
        assert float((with_it - without).norm() / without.norm()) < allowed, name


@pytest.mark.full
@REENTRANT
@HALF
@pairs(2, models=[model for model in CAN if model != "mixtral"])
def test_half_precision_recomputes_to_the_same_elsewhere(
    case: str, model: str, autocast: bool, reentrant: bool
) -> None:
    test_half_precision_recomputes_to_the_same(case, model, autocast, reentrant)


@REENTRANT
def test_recomputation_happens(reentrant: bool) -> None:
    """The test above would pass on a model that does not checkpoint."""
    view = made("llama", "after", reentrant, "lora")
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with view.base.model.layers[0].self_attn.q_proj.register_forward_hook(count):
        loss(view).backward()
    assert calls == 2


@REENTRANT
@pytest.mark.parametrize("case", ["lora", "bottleneck", "prefix", "prompt"])
def test_learned_gates_get_the_gradients_that_they_get_without(case: str, reentrant: bool) -> None:
    found: list[dict[str, Tensor | None]] = []
    for when in ("after", "never"):
        view = made("llama", when, reentrant, case, "lora-all-linear" if case == "lora" else "lora")
        view.set_adapter(Sum("a", "b", weights=[Learned(0.7), Learned(0.3)]))
        one = loss(view)
        (one + loss(view, ids(seed=2))).backward()
        found.append(gradients(view))
        gates = [g for n, g in found[-1].items() if n.startswith("gates.")]
        assert len(gates) == 2
        assert all(g is not None and g.abs() > 0 for g in gates)
    same_gradients(*found)


class Stack(nn.Module):
    """A plain module that checkpoints a part of itself."""

    def __init__(self, checkpoint: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpoint = checkpoint
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def part(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if self.checkpoint is None else self.checkpoint(self.part, x)


def stack(checkpoint: Any) -> PeftModel:
    torch.manual_seed(0)
    return PeftModel(
        Stack(checkpoint), LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False, init_seed=1)
    )


@REENTRANT
def test_a_module_that_checkpoints_itself(reentrant: bool) -> None:
    """With coadapt.checkpoint the frame comes along; with torch's own, the recomputation is refused."""
    x = torch.ones(2, 4, requires_grad=True)
    plain = stack(None)
    plain(x).sum().backward()
    carried = stack(lambda f, x: coadapt.checkpoint(f, x, use_reentrant=reentrant))
    carried(x).sum().backward()
    same_gradients(gradients(carried), gradients(plain))
    lost = stack(lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant))
    with pytest.raises(RuntimeError, match=r"coadapt\.checkpoint"):
        lost(x).sum().backward()


def test_the_base_may_checkpoint_too() -> None:
    """A base that has sites, called by itself with checkpointing, trains as a base does."""
    base = MAKE["llama"]()
    view = attach(base, "llama", "lora")
    recompute(base, reentrant=False)
    base.train()
    embeds = base.get_input_embeddings()(ids()).requires_grad_()
    base(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    first = embeds.grad.clone()
    view.unload()
    fresh = MAKE["llama"]().train()
    embeds.grad = None
    fresh(inputs_embeds=embeds).logits.sum().backward()
    assert torch.equal(first, embeds.grad)
    assert torch.equal(logits(base.eval()), logits(MAKE["llama"]()))
