"""`coadapt eval`: on the rows of a run and on others, cut off and gone on with, and asked wrongly."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import killing
import models
from byte_tokenizer import save_base
from coadapt.core.composition import Sum
from coadapt.evaluation.exam import Exam
from coadapt.training.ask import answer
from coadapt.training.load import load
from coadapt.training.log import read_log

from .conftest import Call

SETTINGS = "--method lora+prompt --r 2 --max-steps 6 --learning-rate 0.05 --per-device-eval-batch-size 16"


@pytest.fixture(scope="module")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA and a prompt, trained on half of the rows."""
    out = tmp_path_factory.mktemp("trained") / "run"
    process = killing.start(
        killing.command,
        out.with_name("log"),
        *f"train --model {base} --data {rows} --output-dir {out} --eval-split 0.5 --use-cpu {SETTINGS}".split(),
    )
    process.join()
    assert process.exitcode == 0, out.with_name("log").read_text()
    return out


def judged(call: Call, out: Path, *args: object) -> dict[str, Any]:
    """What `coadapt eval --json` prints."""
    code, text, said = call("eval", "--use-cpu", "--json", "--out", out, "--max-new-tokens", 6, *args)
    assert code == 0, said
    return json.loads(text)


def by_name(found: dict[str, Any]) -> dict[Any, Any]:
    return {one["composition"]: one["scores"] for one in found["results"]}


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_the_held_out_rows_have_the_loss_that_training_saw(call: Call, trained: Path, tmp_path: Path) -> None:
    found = judged(call, tmp_path / "e.json", "--adapter", trained)
    assert found["data"]["rows"] == 10
    assert found["data"]["told"][0] == "the rows that the run held out"
    scores = by_name(found)
    assert list(scores) == [None, "lora", "prompt", repr(Sum("lora", "prompt"))]
    last = [line["eval/loss"] for line in read_log(trained / "metrics.jsonl") if "eval/loss" in line]
    assert scores[repr(Sum("lora", "prompt"))]["perplexity"]["mean"] == pytest.approx(math.exp(last[-1]), rel=1e-3)


def test_every_answer_is_in_the_file(call: Call, trained: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    printed = judged(call, file, "--adapter", trained, "--data", rows, "--adapters", "0.5*lora", "--limit", 4)
    written = json.loads(file.read_text("utf-8"))
    assert printed == {**{k: v for k, v in written.items() if k not in ("rows", "schema")}, "file": str(file)}
    wanted = {row["prompt"]: row["completion"] for row in map(json.loads, rows.read_text("utf-8").splitlines())}
    assert len(written["rows"]) == 4
    ready = load(None, trained, "0.5*lora", device=torch.device("cpu"))
    for row in written["rows"]:
        prompt = row["asked"]
        assert row["wanted"] == wanted[prompt]
        assert row["found"]["0.5*lora"]["answer"] == answer(ready, prompt, max_new_tokens=6, raw=True)
    losses = [row["found"]["the base"] for row in written["rows"]]
    mean = sum(one["loss"] for one in losses) / sum(one["tokens"] for one in losses)
    assert by_name(written)[None]["perplexity"]["mean"] == pytest.approx(math.exp(mean))


def test_rows_that_it_was_trained_on_are_told(call: Call, trained: Path, rows: Path, tmp_path: Path) -> None:
    told = judged(call, tmp_path / "e.json", "--adapter", trained, "--data", rows, "--limit", 2)["data"]["told"]
    assert any("ROWS THAT IT WAS TRAINED ON" in line for line in told)
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text("utf-8").replace("3", "7"), "utf-8")
    told = judged(call, tmp_path / "f.json", "--adapter", trained, "--data", other, "--limit", 2)["data"]["told"]
    assert told == ["2 of them, drawn (seed 42)"]


def test_a_checkpoint_of_the_run_is_scored_like_its_folder(call: Call, trained: Path, tmp_path: Path) -> None:
    """It names the base itself, and the run's settings are beside it."""
    whole = judged(call, tmp_path / "e.json", "--adapter", trained)
    found = judged(call, tmp_path / "f.json", "--adapter", (trained / "last").resolve())
    assert by_name(found) == by_name(whole)


def test_plain_text_has_perplexity_only(call: Call, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("One line of text.\nAnd another one.\n" * 20, "utf-8")
    found = judged(call, tmp_path / "e.json", "--adapter", trained, "--data", tmp_path / "text.txt", "--max-length", 64)
    assert set(by_name(found)[None]) == {"perplexity"}
    assert found["data"]["rows"] > 5


def test_the_screen_fits_80_columns(call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    given = ("--use-cpu", "--out", tmp_path / "e.json", "--metric", "rouge", "--max-new-tokens", 8)
    code, text, _ = call("eval", "--adapter", trained, *given)
    assert code == 0
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line and "rows of" not in line) <= 80
    assert "rougeL in %, more is better" in text
    assert "within the spread" in text


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA with a head for three classes, and its rows; their words tell the class."""
    folder = tmp_path_factory.mktemp("classes")
    words = {"red": "apple blood", "green": "leaf grass", "blue": "sky sea"}
    lines = [
        {"text": f"{word} {n}", "label": name} for n in range(20) for name, two in words.items() for word in two.split()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    save_base(folder / "base", models.bert)
    how = "--method lora --r 4 --max-steps 80 --learning-rate 0.02 --per-device-train-batch-size 16 --eval-split 0.25"
    process = killing.start(
        killing.command,
        folder / "log",
        *f"train --model {folder}/base --data {folder}/rows.jsonl --output-dir {folder}/run --use-cpu {how}".split(),
    )
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "run", folder / "rows.jsonl"


def test_classes_are_those_of_the_training(call: Call, classifier: tuple[Path, Path], tmp_path: Path) -> None:
    """The rows here begin with another class, and have only two of the three."""
    run, rows = classifier
    lines = [line for line in rows.read_text("utf-8").splitlines() if '"green"' not in line]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(reversed(lines)) + "\n", "utf-8")
    found = judged(call, tmp_path / "e.json", "--adapter", run, "--data", few)
    assert found["task"] == "sequence-classification"
    scores = by_name(found)
    assert scores["default"]["accuracy"]["mean"] > 0.9 > scores[None]["accuracy"]["mean"]
    assert found["results"][1]["against_base"]["accuracy"]["verdict"] == "better"
    assert any("head is new" in line for line in found["data"]["told"])
    written = json.loads((tmp_path / "e.json").read_text("utf-8"))
    assert {row["wanted"] for row in written["rows"]} == {"red", "blue"}
    right = [row["found"]["default"]["answer"] == row["wanted"] for row in written["rows"]]
    assert sum(right) / len(right) == scores["default"]["accuracy"]["mean"]


# ---- cut off ---------------------------------------------------------------------------------------------------------


def test_an_evaluation_that_is_stopped_goes_on(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--adapter", trained, "--batch-size", 3)
    judged(call, tmp_path / "whole.json", *arguments)
    sit, sat = Exam.sit, list[Any]()

    def stopped(exam: Exam, view: Any, who: Any, batch: Any) -> Any:
        if len(sat) == 6:
            raise KeyboardInterrupt
        sat.append((repr(who), tuple(batch)))
        return sit(exam, view, who, batch)

    monkeypatch.setattr(Exam, "sit", stopped)
    code, text, said = call(
        "eval", "--use-cpu", "--json", "--out", tmp_path / "e.json", "--max-new-tokens", 6, *arguments
    )
    assert (code, text) == (1, "")
    assert "What was answered is kept" in said
    assert not (tmp_path / "e.json").exists()
    (part,) = tmp_path.glob(".e.json.*.part")
    part.write_bytes(part.read_bytes()[:-5])  # and in the middle of a write, at that
    again = sat.copy()
    sat.clear()
    sat.append(None)  # so that nothing stops it now
    monkeypatch.setattr(Exam, "sit", lambda *given: (sat.append((repr(given[2]), tuple(given[3]))), sit(*given))[1])
    judged(call, tmp_path / "e.json", *arguments)
    assert len(again) == 6
    assert len(sat) - 1 == 4 * 4 - 5
    assert again[5] in sat
    assert not set(again[:5]) & set(sat)
    assert (tmp_path / "e.json").read_text("utf-8") == (tmp_path / "whole.json").read_text("utf-8")
    assert [file.name for file in tmp_path.iterdir() if "part" in file.name] == []


def test_another_question_does_not_take_up_what_is_kept(call: Call, trained: Path, tmp_path: Path) -> None:
    left = tmp_path / ".e.json.000000000000.part"
    left.write_text('{"who": "the base", "rows": {"0": {"answer": "x"}}}\n', "utf-8")
    judged(call, tmp_path / "e.json", "--adapter", trained)
    assert left.exists()


def test_a_process_that_is_killed_has_kept_what_was_answered(trained: Path, tmp_path: Path) -> None:
    arguments = f"eval --adapter {trained} --use-cpu --batch-size 1 --max-new-tokens 40 --out {tmp_path}/e.json".split()
    process = killing.start(killing.command, tmp_path / "log", *arguments)
    end = time.monotonic() + 60

    def kept() -> int:
        return sum(file.read_bytes().count(b"\n") for file in tmp_path.glob(".e.json.*.part"))

    while kept() < 3 and process.exitcode is None:
        assert time.monotonic() < end
    process.kill()
    process.join()
    assert process.exitcode == -9
    before = kept()
    assert 3 <= before < 40
    assert not (tmp_path / "e.json").exists()
    process = killing.start(killing.command, tmp_path / "log", *arguments)
    process.join()
    assert process.exitcode == 0
    assert f"({before} answers are kept)" in (tmp_path / "log").read_text()
    assert len(json.loads((tmp_path / "e.json").read_text("utf-8"))["rows"]) == 10
    assert kept() == 0


# ---- asked wrongly ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--adapter", "nowhere"], "There is no adapter folder 'nowhere'."),
        (["--adapter", "RUN", "--data", "nowhere.jsonl"], "there is no such file"),
        (["--adapter", "RUN", "--adapters", "lara"], "There is no adapter 'lara'"),
        (["--adapter", "RUN", "--adapters", "lora", "--adapters", "lora"], "'lora' is given twice"),
        (["--adapter", "RUN", "--adapters", "lora +"], "lora +"),
        (["--adapter", "RUN", "--adapters", "learned*lora"], "would make new gates"),
        (["--adapter", "RUN", "--metric", "bleu"], "There is no metric 'bleu'"),
        (["--adapter", "RUN", "--metric", "accuracy"], "accuracy has no meaning for causal-lm"),
        (["--adapter", "RUN", "--limit", "0"], "--limit"),
        (["--adapter", "RUN", "--prompt-column", "asked"], "There is no column 'asked'"),
        (["--adapter", "RUN", "--out", "no/where.json"], "there is no folder no"),
        (["--adapter", "RUN", "--out", "RUN"], "is there already"),
        (["--adapter", "RUN/lora", "--data", "EMPTY"], "is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    args: list[str], said: str, call: Call, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    out = [] if "--out" in args else ["--out", str(tmp_path / "e.json")]
    given = [arg.replace("RUN", str(trained)).replace("EMPTY", str(tmp_path / "empty.jsonl")) for arg in args]
    code, text, error = call("eval", *given, *out)
    assert (code, text) == (2, "")
    assert said in error
    assert [file.name for file in tmp_path.iterdir()] == ["empty.jsonl"]


def test_a_file_that_is_there_is_kept(call: Call, trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    file.write_text("mine", "utf-8")
    code, _, said = call("eval", "--adapter", trained, "--out", file)
    assert (code, file.read_text("utf-8")) == (2, "mine")
    assert "--overwrite" in said
    judged(call, file, "--adapter", trained, "--limit", 1, "--overwrite")
    assert file.read_text("utf-8") != "mine"


# ---- lm_eval ---------------------------------------------------------------------------------------------------------


TASK = r"""
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
target_delimiter: ""
generation_kwargs: {until: ["</s>"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: stripped, filter: [{function: regex, regex_pattern: '(?s)^\s*(.*?)\s*$'}, {function: take_first}]}
"""


@pytest.mark.filterwarnings("ignore")  # what other programs warn of
def test_lm_eval_comes_to_the_same_shares(call: Call, trained: Path, rows: Path, tmp_path: Path) -> None:
    """Another program asks the same adapters; half of the rows want what the LoRA says, others what the base says."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    judged(call, tmp_path / "said.json", "--adapter", trained, "--data", rows)
    said = json.loads((tmp_path / "said.json").read_text("utf-8"))["rows"]
    who = ["lora" if number % 2 else "the base" for number in range(len(said))]
    pairs = zip(said, who, strict=True)
    lines = [{"prompt": row["asked"], "completion": row["found"][name]["answer"].strip()} for row, name in pairs]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (tmp_path / "sums.yaml").write_text(TASK.replace("FILE", str(tmp_path / "sums.jsonl")), "utf-8")
    # Between prompt and answer there is nothing here, neither in training's frame nor in the task's.
    (tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({**r, "completion": f" {r['completion']}"}) + "\n" for r in lines)
    )
    ours = by_name(judged(call, tmp_path / "e.json", "--adapter", trained, "--data", tmp_path / "asked.jsonl"))
    code, text, error = call(
        *("eval", "--adapter", trained, "--use-cpu", "--json", "--out", tmp_path / "f.json"),
        *("--lm-eval", tmp_path / "sums.yaml"),
    )
    assert code == 0, error
    theirs = by_name(json.loads(text))
    shares = {name: scores["exact_match"]["mean"] for name, scores in ours.items()}
    assert {name: scores["sums exact_match"]["mean"] for name, scores in theirs.items()} == shares
    assert 0.5 <= shares["lora"] < 1
    assert len(json.loads((tmp_path / "f.json").read_text("utf-8"))["values"]["lora"]["sums exact_match"]) == 20


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--metric", "loss", "--data", "x"], "--data, --metric has no effect beside --lm-eval"),
        ([], "--lm-eval needs the package lm_eval: pip install 'coadapt[lm-eval]'"),
    ],
)
def test_lm_eval_is_asked_for_where_it_is_missing(
    args: list[str], said: str, call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coadapt.training.harness.find_spec", lambda name: None)
    out = tmp_path / "e.json"
    code, text, error = call("eval", "--adapter", trained, "--lm-eval", "hellaswag", "--out", out, *args)
    assert (code, text, out.exists()) == (2, "", False)
    assert said in error
