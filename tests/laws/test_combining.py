"""One adapter combined by itself is that adapter, over every method: exactly where how= is left out, or refused."""

from typing import Any

import pytest

from coadapt import PeftModel
from coadapt.core.adapter import ModuleCopy
from coadapt.core.lowrank import LowRankMethod
from coadapt.core.method import METHODS, ModuleMethod, WeightMethod
from coadapt.methods.bitfit import BitFit
from coadapt.methods.ln_tuning import LNTuning
from laws.setting import EVERY, MAKE, close, far, logits, pairs, view_on


def way(case: str) -> tuple[str | None, dict[str, Any]]:
    """How an adapter of this case is combined exactly; None where it need not be said."""
    method = METHODS[EVERY[case].method]
    if case == "lora-tokens":
        return "svd", {"r": "full"}  # other rows of an embedding are no product of two factors
    if issubclass(method, ModuleMethod) and not issubclass(method, ModuleCopy):
        return "mean", {}
    if issubclass(method, WeightMethod) and not issubclass(method, LowRankMethod | BitFit | LNTuning):
        return "svd", {"r": "full"}
    return None, {}


REFUSED = {"adaption": "cannot be combined", "prefix-decoupled": "decoupled"}


@pairs(turn=3, models=("llama", "gpt2", "t5", "bert", "bart", "gemma2", "mixtral", "plain", "conv"))
def test_an_adapter_alone(case: str, model: str) -> None:
    view = view_on(model, case, by=0.3)
    expected = logits(view, adapters="a")
    far(expected, logits(view, adapters=[]))
    if case in REFUSED:
        with pytest.raises((TypeError, ValueError), match=REFUSED[case]):
            view.combine("a", adapter_name="b")
        return
    how, options = way(case)
    if how is not None:
        with pytest.raises(ValueError, match="how="):
            view.combine("a", adapter_name="b")
    report = view.combine("a", how, adapter_name="b", **options)
    assert report.exact
    close(logits(view, adapters="b"), expected, within=1e-5)


@pairs(
    turn=1,
    cases=[case for case in EVERY if way(case)[0] is None and case not in REFUSED],
    models=("gpt2", "llama", "mixtral"),
)
def test_saved_it_is_the_same(case: str, model: str, tmp_path: Any) -> None:
    view = view_on(model, case)
    view.combine("a", adapter_name="b")
    view.set_adapter("b")
    view.save_pretrained(tmp_path, selected_adapters=["b"])
    again = PeftModel.from_pretrained(MAKE[model](), tmp_path)
    close(logits(again), logits(view), within=1e-5)
