"""P3, P4, P5, P7, P11: gradients are the exact ones, whatever is switched, checkpointed or mixed in between."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES
from coadapt import PeftModel, PrefixTuningConfig, get_peft_model
from models import ids, logits, stir
from steps import alone, checkpointing, error, gradients, loss, no_checkpointing

METHODS = ["lora", "bottleneck", "prefix", "prompt"]
KINDS = {"reentrant": True, "not-reentrant": False}


def two(make: Callable[..., Any], method: str = "lora") -> PeftModel:
    """A view with two adapters, a and b, that have an effect."""
    view = get_peft_model(make(), CASES[method], adapter_name="a")
    view.add_adapter("b", CASES[method])
    stir(view.adapters)
    return view.train()


def switched(view: PeftModel) -> dict[str, Tensor]:
    """Two forwards with a switch between, one backward."""
    view.zero_grad()
    view.set_adapter("a")
    first = logits(view)
    view.set_adapter("b")
    second = logits(view)
    (first + second).square().mean().backward()
    return {name: gradients(view, name) for name in "ab"}


def by_hand(make: Callable[..., Any], view: PeftModel) -> dict[str, Tensor]:
    """The same, of two views that each hold one adapter, on bases of their own."""
    out = {}
    for name, other in ("ab", "ba"):
        own, fixed = alone(make, view, name), logits(alone(make, view, other)).detach()
        (logits(own) + fixed).square().mean().backward()
        out[name] = gradients(own, name)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_p3_switch_between_forwards(make: Callable[..., Any], method: str) -> None:
    view = two(make, method)
    found, expected = switched(view), by_hand(make, view)
    for name in "ab":
        assert error(found[name], expected[name]) < 1e-5


@pytest.mark.parametrize("reentrant", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_p4_switch_under_checkpointing(make: Callable[..., Any], method: str, reentrant: bool) -> None:
    view = two(make, method)
    expected = switched(view)
    checkpointing(view, reentrant)
    found = switched(view)
    for name in "ab":
        assert error(found[name], expected[name]) < 1e-6
    no_checkpointing(view)
    assert error(switched(view)["a"], expected["a"]) < 1e-6


def test_p5_disable_keeps_frozen_frozen(make: Callable[..., Any]) -> None:
    view = two(make)
    view.freeze("a")
    before = {n: p.requires_grad for n, p in view.named_parameters()}
    with view.disable_adapter():
        assert torch.equal(logits(view), logits(make()))
    assert {n: p.requires_grad for n, p in view.named_parameters()} == before
    with pytest.raises(KeyError), view.disable_adapter():
        raise KeyError
    assert {n: p.requires_grad for n, p in view.named_parameters()} == before
    assert view.trainable() == ["b"]
    assert error(logits(view), logits(make())) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_p7_rows_train_their_own(make: Callable[..., Any], method: str) -> None:
    """Each row's loss is of its own kind, and each adapter gets the gradients of its rows alone."""
    view, tokens, rows = two(make, method), ids(5), ["a", "b", "a", None, "b"]
    logits(view, tokens, adapter_names=rows).square().flatten(1).sum(1).mul(torch.arange(1.0, 6)).sum().backward()
    for name in "ab":
        own = alone(make, view, name)
        mine = [i for i, row in enumerate(rows) if row == name]
        weights = torch.tensor([i + 1.0 for i in mine])
        logits(own, tokens[mine]).square().flatten(1).sum(1).mul(weights).sum().backward()
        assert error(gradients(view, name), gradients(own, name)) < 1e-5


def test_p7_an_adapter_of_no_row_gets_no_gradient(make: Callable[..., Any]) -> None:
    view = two(make)
    logits(view, ids(2), adapter_names=["a", "a"]).sum().backward()
    assert gradients(view, "a").norm() > 0
    assert all(p.grad is None for p in view.get_adapter("b").parameters())


@pytest.mark.parametrize("reentrant", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("enabled", ["before", "after"])
def test_p11_prefix_and_checkpointing(make: Callable[..., Any], enabled: str, reentrant: bool) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, init_seed=5)
    plain = get_peft_model(make(), config).train()
    loss(plain).backward()
    base = make()
    if enabled == "before":
        checkpointing(base, reentrant)
    view = get_peft_model(base, config).train()
    if enabled == "after":
        checkpointing(view, reentrant)
    loss(view).backward()
    assert error(gradients(view, "default"), gradients(plain, "default")) < 1e-6
