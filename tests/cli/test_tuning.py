"""compare and search as a person calls them: what is wrong is one error, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str, str]]
SMALL = ("--use-cpu", "--budget", 2, "--batch-size", 4)


@pytest.mark.parametrize(
    ("verb", "more", "said"),
    [
        ("compare", ("--methods", "lora,ptompt"), "Did you mean 'prompt'"),
        ("compare", (), "methods is missing"),
        ("compare", ("--methods", "lora", "--seeds", 0), "seeds: "),
        ("compare", ("--methods", "lora", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        ("compare", ("--methods", "bitfit"), "bitfit: BitFitConfig found no usual place"),
        ("search", ("--methods", "lora", "--objectives", "speed"), "There is no metric 'speed'"),
        ("search", ("--methods", "lora", "--mixes", 0), "mixes: "),
        ("search", ("--methods", "lora", "--r", 4, "--target-modules", "nowhere"), "nowhere"),
        ("search", ("--methods", "lora", "--lr", 1e-3), "rates are searched"),
    ],
)
def test_what_is_wrong_is_told_in_one_error(
    call: Call, base: Path, rows: Path, tmp_path: Path, verb: str, more: tuple[object, ...], said: str
) -> None:
    data = () if "--data" in more else ("--data", rows)
    code, text, error = call(verb, "--model", base, *data, *SMALL, *more, "--out", tmp_path / "out")
    assert (code, text) == (2, "")
    assert error.count("Error:") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_compare_as_it_is_called(call: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "compare.yaml"
    config.write_text(f"model: {base}\ndata: {rows}\nmethods: lora\ncandidates: {{tiny: {{method: lora, r: 1}}}}\n")
    told = ("compare", "--config", config, *SMALL, "--rates", 1, "--seeds", 1, "--out", tmp_path / "out")
    code, text, error = call(*told)
    assert code == 0, error
    assert "The report: " in text
    assert (tmp_path / "out" / "report.html").is_file()
    code, text, error = call(*told, "--json")
    assert code == 0, error
    found = json.loads(text)
    assert [method["name"] for method in found["methods"]] == ["lora", "tiny"]
    assert found["methods"][0]["costs"]["parameters"]["mean"] > found["methods"][1]["costs"]["parameters"]["mean"]
    assert error.count("(there already)") == 2


@pytest.mark.full
def test_search_as_it_is_called(call: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    told = ("search", "--model", base, "--data", rows, *SMALL, "--methods", "prompt", "--out", tmp_path / "out")
    code, text, error = call(*told, "--trials", 1)
    assert code == 0, error
    assert "Train the best: coadapt train --config " in text
    code, _, error = call("train", "--config", tmp_path / "out" / "best.yaml", "--output-dir", tmp_path / "again")
    assert code == 0, error
    code, text, error = call(*told, "--trials", 1, "--json")
    assert code == 0, error
    assert len(json.loads(text)["trials"]) == 1
