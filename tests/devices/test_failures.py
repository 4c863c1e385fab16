"""One process fails, or is killed: all end, one says why, and no half file is left."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coadapt.formats.files import COMPOSITION
from coadapt.training.folder import damage
from devices.ranks import Together, settings


def test_an_error_in_one_process_ends_all_with_one_message(base: str, rows: str, tmp_path: Path) -> None:
    told = Together(tmp_path / "ranks", 2, settings(base, rows, tmp_path / "out", 4, 1), trouble={"fail": 3}).ended()
    assert [one.code for one in told] == [1, 1]
    assert "error:" not in told[0].said
    assert told[1].said == "error: process 1 of 2 failed: the disk is on fire\n"


def test_what_is_wrong_in_all_is_said_once(base: str, tmp_path: Path) -> None:
    told = Together(tmp_path / "ranks", 2, settings(base, str(tmp_path / "no.jsonl"), tmp_path / "out", 4, 1)).ended()
    assert [one.code for one in told] == [1, 1]
    assert told[0].said.startswith("error: ")
    assert "no.jsonl" in told[0].said
    assert told[1].said == ""
    told = Together(tmp_path / "ranks", 2, settings(base, "x", tmp_path / "out", 4, 1, "--max-length=1")).ended()
    assert [one.code for one in told] == [2, 2]
    assert "max_length" in told[0].said
    assert told[1].said == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_killed_process_ends_all_and_leaves_no_half_file(base: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = Together(tmp_path / "ranks", 2, settings(base, rows, out, 4, 1), trouble={"kill": 4}).ended()
    assert [one.code for one in told] == [1, -9]
    assert "error: Another process of this run ended without a word" in told[0].said
    assert not (out / COMPOSITION).exists()
    whole = [path for path in out.glob("checkpoint-*") if damage(path) is None]
    assert [path.name for path in whole] == [
        "checkpoint-2"
    ]  # that of step 4 lacks the state of a process, if it is there
    again = Together(tmp_path / "ranks", 2, settings(base, rows, out, 4, 1, "--resume")).ended()
    assert [one.code for one in again] == [0, 0]
    assert "Going on from checkpoint-2" in again[0].said
    assert (out / COMPOSITION).is_file()
    assert again[0].state is not None
    last = load_file(max(out.glob("checkpoint-8")) / "model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in again[0].state.items())
