"""`coadapt estimate` and `coadapt data check` as a person calls them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coadapt.training import memory
from coadapt.training.memory import Room

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def narrow(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # after `call`, which has its own


@pytest.mark.usefixtures("narrow")
def test_an_estimate_is_a_table_and_json(call: Call, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = ("estimate", "--model", base, "--method", "prompt + lora", "--lora_r", 4, "--max-length", 16, "--use-cpu")
    code, text, said = call(*ask)
    assert (code, said) == (0, "hint: lora_r is called r here.\n")
    for part in ("adapters", "gradients", "optimiser", "activations", "sum", "peak", "it fits", "largest batch"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80
    code, text, _ = call(*ask, "--calibrate", "--json")
    told = json.loads(text)
    assert code == 0
    assert told["fits"]
    assert told["step"]["peak"] == pytest.approx(told["measured"]["peak"], rel=0.1)
    assert told["peak"] == max(told["measured"]["peak"], told["evaluation"], told["trial"])
    monkeypatch.setattr(memory, "room", lambda device: Room(free=2**20, total=2**30))
    code, text, _ = call(*ask)
    assert code == 1
    assert "it does not fit" in text


def test_an_estimate_takes_the_yaml_of_train(call: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\ndata: {rows}\nadapters: {{a: {{method: lora, r: 2}}, b: {{method: prompt}}}}\n"
        "composition: a + 0.5*b\nsave_steps: 5\nuse_cpu: true\n"
    )
    code, text, said = call("estimate", "--config", config, "adapters.b.num_virtual_tokens=3", "--json")
    assert code == 0, said
    told = json.loads(text)
    assert told["adapters"] == {"a": "lora", "b": "prompt_tuning"}
    assert told["length"] == max(len(f"{a}? {a}!") + 2 for a in range(20)), "the longest row, not max_length"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("estimate", "--model", "no/such/model"), "is no folder with a model"),
        (("estimate", "--r", 4, "--method", "prompt", "--model", "x"), "r is not read by prompt"),
        (("estimate", "--save-steps", 4), "No such option"),
        (("data", "check"), "data is missing"),
        (("data", "check", "nowhere.jsonl"), "there is no such file"),
        (("data", "chek", "nowhere.jsonl"), "No such command"),
    ],
)
def test_wrong_input_is_told_with_exit_code_2(
    call: Call, arguments: tuple[object, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, error = call(*arguments)
    assert (code, text) == (2, "")
    assert said in error
    assert error.count("Error:") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("narrow")
def test_data_is_checked(call: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    code, text, said = call("data", "check", rows, "--model", base)
    assert code == 0, said
    assert "prompt + completion" in text
    assert "⟦" in text
    assert "Nothing was found that should be changed." in text
    bad = tmp_path / "bad.jsonl"
    bad.write_text(rows.read_text() + rows.read_text().splitlines()[0] + '\n{"prompt": "a", "completion": ""}\n')
    code, text, _ = call("data", "check", bad, "--eval-split", 0)
    assert code == 1
    assert "2 things to change, or to know" in text
    assert "! empty, train: 1 of 22 rows" in text
    assert max(map(len, text.splitlines())) <= 80
    code, text, _ = call("data", "check", bad, "--eval-split", 0, "--json")
    told = json.loads(text)
    assert (code, told["fine"]) == (1, False)
    assert {(f["what"], f["count"], *f["rows"]) for f in told["datasets"][0]["findings"]} == {
        ("duplicates", 1, 20),
        ("empty", 1, 21),
    }


def test_every_data_set_of_a_run_is_checked(call: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\nadapters: {{a: {{method: lora}}, b: {{method: lora}}}}\n"
        f"datasets: {{one: {{data: {rows}, composition: a}}, two: {{data: {rows}, composition: b}}}}\n"
    )
    code, text, said = call("data", "check", "--config", config)
    assert code == 0, said
    assert (text.count("max_length"), text.count("Nothing was found")) == (2, 2)
