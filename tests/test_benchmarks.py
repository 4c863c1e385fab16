"""The benchmarks run, count what a second way of counting counts, and say what they found. No time is asserted."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import coadapt
from benchmarks import __main__ as bench
from benchmarks import beside_peft, memory, profiles, training_step
from benchmarks.measuring import Candidate, Live, alive_after, interleaved
from benchmarks.report import BYTES, COUNT, RATIO, SECONDS, Figure, Row, ratio, shown
from benchmarks.setting import LORA, Setting, Step, adapted, batch, limit, llama
from coadapt.config import CONFIGS
from coadapt.core.method import METHODS

QUICK = Setting(rounds=1, quick=True)
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's, about what it is asked to do


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("number", bench.ROWS)
def test_every_row_is_measured(number: str) -> None:
    rows = bench.ROWS[number](QUICK)
    assert {row.number for row in rows} == {number}
    for row in rows:
        figures = [f for f in (row.base, row.peft, row.coadapt) if isinstance(f, Figure)]
        assert all(math.isfinite(value) for figure in figures for value in figure.values)
        assert row.peft == "refused" or isinstance(row.peft, Figure) or (row.peft == "none" and not has_peft(row))


def has_peft(row: Row) -> bool:
    """Whether peft can do what a row measures."""
    ours = ("bottleneck", "BitFit", "invertible", "full copy", "packages", "compositions", "import coadapt")
    return not any(word in row.what for word in ours)


def test_rows_of_methods_name_methods() -> None:
    beside_limit = [(config, given) for config, given, _ in training_step.METHODS.values()]
    every = [getattr(coadapt, c)(**given) for c, given in [*beside_limit, *beside_peft.configurations(QUICK).values()]]
    found = [config.method for config in every]
    assert set(found) <= set(METHODS)
    theirs = {str(kind.value) for kind in peft.PeftType} & {config.peft_type for config in CONFIGS.values()}
    left_out = theirs - {config.peft_type for config in every}
    assert left_out <= {"XLORA", "ADAMSS"}, "the one mixes adapters that are there; the other's needs scikit-learn"


def saved(step: Step) -> int:
    """Bytes that autograd's own hooks see: distinct storages, but for the weights and inputs that it refers to."""
    held: dict[int, Any] = {}

    def see(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        loss = step.forward()
    there = (*step.model.parameters(), *step.model.buffers(), *step.inputs.values(), loss)
    own = {tensor.untyped_storage()._cdata for tensor in there if isinstance(tensor, Tensor)}
    return sum(storage.nbytes() for key, storage in held.items() if key not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("who", ["limit", "full", "coadapt", "peft"])
def test_what_is_alive_after_a_forward_is_what_autograd_keeps(who: str, dtype: torch.dtype) -> None:
    base, ids = llama(QUICK, dtype), batch(QUICK)
    if who == "limit":
        step = limit(base, ids)
    elif who == "full":
        step = Step(base.train(), input_ids=ids, labels=ids)
    else:
        step = Step(adapted(who, base, "LoraConfig", **LORA), input_ids=ids, labels=ids)
    step()
    assert alive_after(step.forward) == saved(step) > 0


class Hiding(torch.autograd.Function):
    """x, with something for the backward that autograd is not told of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = torch.ones(256)
        return x.clone()


def test_what_is_kept_beside_the_graph_counts() -> None:
    x = torch.ones(64, requires_grad=True)
    assert alive_after(lambda: Hiding.apply(x).exp().sum()) == 1024 + 256, "256: what exp gave"


def test_live_counts_each_storage_once_and_forgets_the_dead() -> None:
    before = torch.ones(100)
    with Live() as live:
        one = torch.ones(256)
        view, alias = one[:2], before[:3]
        assert live.now == 1024
        other = one + one
        del one
        assert (live.now, live.peak) == (2048, 2048), "the view holds it"
        del view
        assert (live.now, live.peak) == (1024, 2048)
        del other
    assert (live.now, live.peak, len(alias)) == (0, 2048, 3)


def test_candidates_take_turns_behind_a_warm_up() -> None:
    said: list[str] = []
    a, b = (lambda: said.append("a")), Candidate(lambda: said.append("b"), after=lambda: said.append("-"))
    found = interleaved({"a": a, "b": b}, Setting(rounds=3))
    assert "".join(said) == "aab-b-" + 3 * "ab-"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_each_round() -> None:
    """The machine slows down fourfold; the ratio stays."""
    row = ratio("F0", "x", {"limit": [1.0, 2.0, 4.0], "coadapt": [1.5, 2.5, 6.0], "peft": [2.0, 4.0, 8.0]}, goal=1.5)
    assert (row.coadapt.median, row.coadapt.quartiles) == (1.5, (1.375, 1.5))
    assert row.cells() == ["F0", "x", "2 s (1.5 .. 3)", "2.00 (2.00 .. 2.00)", "1.50 (1.38 .. 1.50)", "≤ 1.50", "yes"]
    assert row.no_more_than_peft().goal == 2.0
    assert Row("F0", "x", None, "none", Figure([1.506], RATIO), 1.5).reached == "no"
    assert Row("F0", "x", None, "none", Figure([1.504], RATIO), 1.5).reached == "yes", "as it is shown"


def test_every_method_beside_peft_has_a_line() -> None:
    seconds, held = {"peft": [2.0, 4.0], "coadapt": [1.0, 3.0]}, {"peft": [2.0**20], "coadapt": [2.0**19]}
    rows = [
        ratio("F17", f"A: B: {beside_peft.STEP}", seconds, base="peft"),
        ratio("F17", f"A: B: {beside_peft.KEPT}", held, base="peft", unit=BYTES),
    ]
    line = "| A: B | 3 s (2.5 .. 3.5) | 0.62 (0.56 .. 0.69) | 1 MiB | 0.50 |"
    assert beside_peft.compact(rows).splitlines()[2:] == [line]
    told = {"date": "", "versions": {}, "device": "", "rounds": 1}
    assert bench.text(told, [Row("F1", "x", None, "none", Figure([1.0], RATIO)), *rows], "").count("| F1 |") == 1
    assert line in bench.text(told, rows, "")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, SECONDS, "123 ms"),
        (-2.5e-6, SECONDS, "-2.5 µs"),
        (3 * 2**20, BYTES, "3 MiB"),
        (0.995, RATIO, "0.99"),
        (50, COUNT, "50"),
    ],
)
def test_figures_are_shown_in_the_scale_that_suits_them(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_a_run_keeps_its_table_and_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--only", "F1,F3", "--quick", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out.strip()
    (kept,) = tmp_path.glob("*.md")
    assert table in kept.read_text("utf-8")
    held = json.loads(next(tmp_path.glob("performance-*-cpu-F1-F3.json")).read_text("utf-8"))
    assert held["versions"]["torch"] == torch.__version__
    first = held["rows"][0]
    assert (first["number"], len(first["coadapt"]["rounds"]), len(first["base"]["rounds"])) == ("F1", 2, 2)
    assert sum(row["number"] == "F3" for row in held["rows"]) == table.count("| F3 |") == 6


def test_a_row_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(setting: Setting) -> list[Row]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(bench, "ROWS", {**bench.ROWS, "F1": broken})
    assert bench.main(["--only", "F1,F15", "--quick", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert "| F15 |" in out
    assert "out of luck" in error and error.endswith("errors above: F1.\n")


def test_the_table_goes_between_the_marks_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "benchmarks.md"
    docs.write_text(bench.DOCS.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(bench, "DOCS", docs)
    before, _, after = re.split(r"(?<=python -m benchmarks -->\n)|(?=<!-- /measured)", docs.read_text("utf-8"))
    bench.publish("a \\1 table\n")
    assert docs.read_text("utf-8") == f"{before}a \\1 table\n{after}"


TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


QUICKLY = [("full fine-tuning", False), ("LoRA + prompt", False), ("LoRA + prompt", True)]
EVERY = [(way, checkpointing) for way in memory.WAYS for checkpointing in (False, True)]


@pytest.mark.parametrize(
    ("way", "checkpointing"), [c if c in QUICKLY else pytest.param(*c, marks=pytest.mark.full) for c in EVERY]
)
def test_bytes_counted_without_data_are_those_of_a_real_step(way: str, checkpointing: bool) -> None:
    given = argparse.Namespace(rows=3, length=24, checkpointing=checkpointing)
    empty = memory.counted(TINY, way, given)
    real = memory.one_run(Live(), lambda: memory.model(TINY, way, checkpointing), 3, 24)
    assert (empty.gradients, empty.optimizer) == (real.gradients, real.optimizer)
    assert empty.weights == pytest.approx(real.weights, rel=0.01)
    assert empty.activations == pytest.approx(real.activations, rel=0.1)
    assert empty.peak == pytest.approx(real.peak, rel=0.1)


def test_profiles_tell_where_all_of_the_time_goes() -> None:
    found = profiles.spent(lambda: torch.ones(40, 40) @ torch.ones(40, 40), 3)
    parts = {what: us for what, us in found.us.items() if what != "whole"}
    assert sum(parts.values()) == pytest.approx(found.us["whole"])
    assert found.times["products of matrices"] == 1
    assert found.times["copies, and new memory"] >= 2


def test_profiles_run(capsys: pytest.CaptureFixture[str]) -> None:
    profiles.main(["--quick", "--threads", "1"])
    assert capsys.readouterr().out.count("| whole |") == 7
