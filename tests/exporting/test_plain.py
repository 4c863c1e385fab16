"""Any method as one plain LoRA: exact where no rank is cut, and the loss that is told is the loss that there is."""

import pytest
import torch

from cases import CASES
from coadapt import PeftModel
from coadapt.core.adapter import start_from
from coadapt.core.layer import Layer
from coadapt.core.method import METHODS, WeightMethod
from coadapt.exporting.plain import obstacles, plain_lora
from laws.setting import MAKE, close, far, fits, rest, view_on
from models import logits

BIASES = {
    "llama": {"bitfit", "beft"},
    "gpt2": {"bitfit", "beft", "ia3", "glora", "road", "adamss", "adamss-asa", "full-copy"},
    "t5": {"bitfit", "beft"},
}
"""Cases that train biases there, or parameters that are no matrix; a plain LoRA holds none."""
NO_MATRIX = {"ln-tuning"}
TIED = {"gpt2": {"tokens"}, "t5": {"tokens"}}
BY_INPUT = {"a-lora", "lily"}
"""Changes that depend on a layer's input."""


def _a_weight_s(case: str) -> bool:
    return issubclass(METHODS[CASES[case].method], WeightMethod) or case == "full-copy"


@pytest.mark.parametrize("model", ["llama", *rest("gpt2", "t5")])
@pytest.mark.parametrize("case", CASES)
def test_every_method_becomes_a_lora_or_says_why_not(case: str, model: str) -> None:
    if not fits(case, model):
        pytest.skip("no place there")
    view = view_on(model, case).eval()
    adapters = {"a": view.get_adapter("a")}
    found = obstacles(view.base, adapters, "a", True)
    not_so = BIASES[model] | NO_MATRIX | TIED.get(model, set()) | BY_INPUT
    assert bool(found) == (not _a_weight_s(case) or case in not_so), [o.what for o in found]
    if found:
        return
    lora, report = plain_lora(view.base, adapters, "a", "full")
    assert report.exact and all(row.rank is not None and row.rank <= 64 for row in report.rows)
    other = PeftModel(MAKE[model]())
    other.add_adapter("a", lora.config)
    start_from(other.get_adapter("a"), lora)
    other.set_adapter("a")
    close(logits(other.eval()), logits(view), 1e-5)
    far(logits(view), logits(MAKE[model]()))


@pytest.mark.parametrize("case", ["hira", "ia3", "dora", "lokr", "oft", "waveft", "shira"])
def test_the_loss_told_is_that_of_the_merged_weights(case: str) -> None:
    view = view_on("llama", case)
    base = MAKE["llama"]()
    lora, report = plain_lora(view.base, {"a": view.get_adapter("a")}, "a", 1)
    merged = view.merge_and_unload()
    for part, row in zip(lora.parts, report.rows, strict=True):
        path = part.place.path
        assert path == row.path
        change = Layer(merged.get_submodule(path)).weight() - Layer(base.get_submodule(path)).weight()
        a, b, scale = part.method.factors()  # type: ignore[operator]
        lost = (change - scale * b @ a).norm() / change.norm()
        best = torch.linalg.svdvals(change)[1:].norm() / change.norm()
        assert row.lost == pytest.approx(float(lost), abs=1e-4)
        assert float(lost) == pytest.approx(float(best), abs=1e-4)
