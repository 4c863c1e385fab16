"""What is saved and loaded again gives the same outputs, to the bit."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given

from coadapt import Learned, PeftModel, Seq, Sum
from laws.setting import MAKE, attach, close, far, few, fits, gradients, logits, loss, pairs, view_on


def same(case: str, one: torch.Tensor, other: torch.Tensor) -> None:
    """To the bit, but for biases trained along: the field's files hold their sum with the base's, not the change."""
    if case in ("lora-bias", "glora-bias"):
        close(one, other)
    else:
        assert torch.equal(one, other)


@pairs(3)
def test_one_adapter(case: str, model: str, tmp_path: Path) -> None:
    view = view_on(model, case)
    view.save_pretrained(tmp_path)
    fresh = MAKE[model]()
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    same(case, logits(loaded), logits(view))
    assert loaded.active_adapters == ["a"]
    assert loaded.trainable() == []
    trained = PeftModel.from_pretrained(MAKE[model](), tmp_path, is_trainable=True)
    same(case, logits(trained), logits(view))
    assert trained.trainable() == ["a"]
    loss(view).backward()
    loss(trained).backward()
    ours, theirs = gradients(view), gradients(trained)
    assert list(ours) == list(theirs), "optimisers number parameters"
    for name, gradient in ours.items():
        other = theirs[name]
        assert gradient is not None
        assert other is not None
        close(gradient, other)


@pairs(4)
def test_a_composition(case: str, model: str, tmp_path: Path) -> None:
    other = next(c for c in ("bottleneck", "lora") if c != case and fits(c, model))
    view = view_on(model, case, other, case)
    view.set_adapter(Seq(Sum("a", "b", weights=[1, -0.5]), "c"))
    view.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MAKE[model](), tmp_path)
    same(case, logits(loaded), logits(view))
    assert repr(loaded.composition) == repr(view.composition)


@pairs(5)
def test_beside_what_is_there(case: str, model: str, tmp_path: Path) -> None:
    view = view_on(model, case)
    view.save_pretrained(tmp_path)
    other = view_on(model, "lora")
    before = logits(other)
    other.load_adapter(tmp_path / "a", adapter_name="new")
    assert torch.equal(logits(other), before), "what is active stays"
    same(case, logits(other, adapters="new"), logits(view))


@pairs(0)
def test_state_dict_holds_adapters_only_and_loads_back(case: str, model: str) -> None:
    one, two = view_on(model, case, "lora"), view_on(model, case, "lora", by=0.3)
    state = one.state_dict()
    assert {k.split(".")[0] for k in state} <= {"adapters", "gates", "_extra_state"}
    for key in state:
        if not key.startswith("_"):
            assert torch.equal(_attribute(one, key), state[key]), "keys are attribute paths"
    far(logits(two), logits(one))
    own = len(list(two.parameters()))
    written = safetensors.torch.save(state)  # as transformers' Trainer does: nothing twice, and all contiguous
    two.load_state_dict(safetensors.torch.load(written), assign=True)
    assert torch.equal(logits(two), logits(one))
    assert len(list(two.parameters())) == own, "what sites share stays shared"
    two.load_state_dict(state)
    assert torch.equal(logits(two), logits(one))
    assert all(
        torch.equal(a, b) for a, b in zip(one.base.state_dict().values(), two.base.state_dict().values(), strict=True)
    )


def _attribute(view: torch.nn.Module, path: str) -> torch.Tensor:
    found: object = view
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, torch.Tensor)
    return found


@few
@given(start=st.floats(0.05, 20), weight=st.floats(-3, 3))
def test_gates(start: float, weight: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    where = tmp_path_factory.mktemp("gates")
    view = view_on("plain", "lora", "bitfit")
    view.set_adapter(Sum("a", "b", weights=[Learned(start), weight]))
    view.save_pretrained(where)
    loaded = PeftModel.from_pretrained(MAKE["plain"](), where)
    assert torch.equal(logits(loaded), logits(view))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_their_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """fp32 adapters of a half precision base are written and read as fp32."""
    base = MAKE["llama"]().to(dtype)
    view = attach(base, "llama", "lora")
    view.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MAKE["llama"]().to(dtype), tmp_path)
    assert loaded.get_adapter("a").weight.dtype == torch.float32
    assert torch.equal(loaded.get_adapter("a").weight, view.get_adapter("a").weight)
    assert torch.equal(logits(loaded), logits(view))
