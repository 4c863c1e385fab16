"""What a view asks of the DistributedDataParallel around it, and what it tells where that does not fit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from coadapt import Learned, LoraConfig, PeftModel, Sum
from laws.setting import attach, gradients, ids, recompute, same_gradients, view_on
from models import llama


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one, on the CPU: what is refused does not depend on the others."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(view: PeftModel) -> DistributedDataParallel:
    return DistributedDataParallel(view, find_unused_parameters=True)


def test_an_adapter_that_takes_no_part_needs_the_setting() -> None:
    """Plain, the wrapper would wait for its gradient: in the second step, with a message about something else."""
    view = view_on("llama", "lora", "prompt").train()
    plain = DistributedDataParallel(view)
    for options in ({"adapters": "a"}, {"adapters": "a + 0*b"}, {"adapter_names": ["a", None, "a"]}):
        with pytest.raises(RuntimeError, match=r"b would train, but takes no part.*find_unused_parameters=True"):
            plain(ids(), **options)
    plain(ids(), adapters="a + b").logits.sum().backward()  # all of them
    plain(ids(), adapter_names=["a", None, "b"]).logits.sum().backward()
    assert all(g is not None for g in gradients(view).values())
    with torch.no_grad():
        plain(ids(), adapters="a")  # nothing is waited for
    view.freeze("b")
    again = DistributedDataParallel(view)
    again(ids(), adapters="a").logits.sum().backward()


@pytest.mark.parametrize("late", ["attached", "unfrozen", "gate", "gate of the call"])
def test_what_came_after_the_wrapper_is_refused(late: str) -> None:
    """Its gradients would not be averaged, and each process would train an adapter of its own."""
    view = view_on("llama", "lora", "prompt").train()
    view.freeze("b")
    model, gated = wrapped(view), Sum("a", weights=[Learned(0.5)])
    if late == "attached":
        view.add_adapter("c", LoraConfig(r=2))
    elif late == "unfrozen":
        view.unfreeze("b")
    elif late == "gate":
        view.set_adapter(gated)
    options = {"attached": "a + c", "unfrozen": "b", "gate": None, "gate of the call": gated}
    name = {"attached": "c", "unfrozen": "b"}.get(late, "gates")
    with pytest.raises(RuntimeError, match=rf"^{name}: attached, unfrozen or made active after.*Wrap it again"):
        model(ids(), adapters=options[late])
    model(ids(), adapters="a").logits.sum().backward()
    assert all(p.grad is not None for p in view.get_adapter("a").parameters())
    if late == "gate":
        again = wrapped(view)
        again(ids()).logits.sum().backward()
        assert view.gates[0].log_gate.grad is not None


def test_reentrant_checkpointing_needs_another_setting() -> None:
    view = view_on("llama", "lora").train()
    recompute(view, reentrant=True)
    model = wrapped(view)
    with pytest.raises(RuntimeError, match=r"use_reentrant=False.*static_graph=True"):
        model(ids())
    fixed = DistributedDataParallel(view, static_graph=True)
    fixed(ids()).logits.square().mean().backward()
    found = gradients(view)
    recompute(view, reentrant=False)
    model(ids()).logits.square().mean().backward()
    same_gradients(found, gradients(view))


def test_the_output_is_the_views_own() -> None:
    """Joining changes no value and no kind, and a loss can be divided in place."""
    view = attach(llama(), "llama", "lora", "prefix").train()
    tokens = ids()
    model = wrapped(view)
    expected = view(tokens, labels=tokens, output_hidden_states=True, use_cache=True)
    found = model(tokens, labels=tokens, output_hidden_states=True, use_cache=True)
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
    loss = found.loss
    loss /= 2
    loss.backward()
    half = gradients(view)
    (expected.loss / 2).backward()
    same_gradients(half, gradients(view))


def test_outside_of_the_wrapper_nothing_is_asked() -> None:
    """The same view, called by itself, may do anything."""
    view = view_on("llama", "lora", "prompt").train()
    DistributedDataParallel(view)
    view(ids(), adapters=Sum("a", weights=[Learned()])).logits.sum().backward()
    assert "Join" not in str(view(ids()).logits.grad_fn)
