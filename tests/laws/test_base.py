"""The base stays the base, whatever is attached to it; what is taken off leaves no trace."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coadapt import PeftModel
from laws.setting import MAKE, attach, close, far, ids, logits, pairs


def look(base: nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """Class and attributes of every module, by identity of what is in them."""
    out: dict[str, tuple[type, dict[str, Any]]] = {}
    for name, module in base.named_modules():
        own = {k: {n: id(v) for n, v in x.items()} if isinstance(x, dict) else id(x) for k, x in vars(module).items()}
        out[name] = (type(module), own)
    return out


@pairs(0)
def test_base_is_the_base_while_attached(case: str, model: str, tmp_path: Path) -> None:
    base: Any = MAKE[model]()
    before, seen = logits(base), look(base)
    keys, values = list(base.state_dict()), {k: v.clone() for k, v in base.state_dict().items()}
    view = attach(base, model, case, "lora", by=0.3)
    far(logits(view), before)
    assert torch.equal(logits(base), before)
    assert view.get_base_model() is base
    assert list(base.state_dict()) == keys
    assert all(torch.equal(v, values[k]) for k, v in base.state_dict().items())
    assert list(dict(base.named_modules())) == list(seen)
    for name, module in base.named_modules():
        cls = seen[name][0]
        assert isinstance(module, cls)
        assert type(module).__name__ == cls.__name__
        assert type(module).__module__ == cls.__module__
    if hasattr(base, "save_pretrained"):
        base.save_pretrained(tmp_path)
        assert [f.name for f in tmp_path.iterdir() if "adapter" in f.name] == []
        reloaded, info = type(base).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        MAKE[model]().save_pretrained(tmp_path / "alone")  # some models write other keys than they have
        assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(tmp_path / "alone/model.safetensors"))
        close(logits(reloaded.eval().requires_grad_(False)), before)


def by_unload(view: PeftModel) -> nn.Module:
    return view.unload()


def by_deleting_each(view: PeftModel) -> nn.Module:
    base = view.get_base_model()
    for name in list(view.peft_config):
        view.delete_adapter(name)
    return base


@pytest.mark.parametrize("way", [by_unload, by_deleting_each])
@pairs(1)
def test_removal_leaves_no_trace(case: str, model: str, way: Callable[[PeftModel], nn.Module]) -> None:
    base = MAKE[model]()
    before, seen = logits(base), look(base)
    view = attach(base, model, case, "lora")
    view.train()
    loss = logits(view).sum()
    loss.backward()
    view.eval()
    logits(view, adapter_names=["a", "b", None])
    assert way(view) is base
    assert look(base) == seen
    assert torch.equal(logits(base), before)


@pairs(2)
def test_a_view_that_is_forgotten_leaves_no_trace(case: str, model: str) -> None:
    base = MAKE[model]()
    seen = look(base)
    view = attach(base, model, case)
    logits(view)
    del view
    gc.collect()
    assert look(base) == seen


@pairs(3)
def test_nothing_active_is_the_base_bit_for_bit(case: str, model: str) -> None:
    base = MAKE[model]()
    before = logits(base)
    view = attach(base, model, case, "lora")
    far(logits(view), before)
    with view.disable_adapter():
        assert torch.equal(logits(view), before)
    assert torch.equal(logits(view, adapters=[]), before)
    assert torch.equal(logits(view, adapter_names=[None] * len(ids())), before)
    assert torch.equal(logits(view, adapter_names=["__base__"] * len(ids())), before)
    view.set_adapter(None)
    assert torch.equal(logits(view), before)


@pairs(4, cases=["lora", "lora-all-linear", "bottleneck", "bottleneck-parallel", "bitfit"])
def test_gate_0_in_a_mixed_batch_is_the_base_bit_for_bit(case: str, model: str) -> None:
    base = MAKE[model]()
    before = logits(base)
    view = attach(base, model, case, "lora")
    mixed = logits(view, adapter_names=["a", None, "0*a + b"])
    assert torch.equal(mixed[1], before[1])
    far(mixed[0], before[0])
