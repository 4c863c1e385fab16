"""The dialogue example runs, from the data to its picture, on the real small model and real texts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from coadapt.training.settings import RunConfig
from coadapt.training.timetable import Span, timetable

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "dialogue"
ASSETS = ROOT.parent / "shared" / "assets"
MODEL = ASSETS / "weights" / "stories260K-hf"


@pytest.mark.parametrize(("file", "plays"), [("joint", Span()), ("staged", Span(start=150)), ("together", Span())])
def test_its_yaml_is_a_run(file: str, plays: Span) -> None:
    run = RunConfig(model="base", **yaml.safe_load((EXAMPLE / f"{file}.yaml").read_text("utf-8")))
    assert timetable(run).datasets["plays"] == plays


@pytest.mark.skipif(not ASSETS.is_dir(), reason=f"needs the real model and data in {ASSETS}")
def test_the_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE / "dialogue.py"), "--quick", "--out", str(tmp_path)]
    command += ["--model", str(MODEL), "--data", str(ASSETS / "data")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    table = (tmp_path / "table.md").read_text("utf-8")
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
    losses = {row[0]: [float(cell) for cell in row[1:3]] for row in cells if row[1][:1].isdigit()}
    assert losses["knowledge"][0] < losses["base"][0] - 1, "knowledge foretells facts"
    assert losses["style"][1] < losses["base"][1] - 0.5, "style foretells plays"
    assert losses["knowledge + style"][1] < losses["knowledge"][1], "and keeps doing so beside knowledge"
    joint, staged = (
        load_file(tmp_path / run / "knowledge" / "adapter_model.safetensors") for run in ("joint-1", "staged-1")
    )
    for key, tensor in joint.items():  # learnt beside the style, or before it: the same
        assert (tensor - staged[key]).norm() <= 1e-3 * tensor.norm(), key
    trained = (tmp_path / "facts.jsonl").read_text("utf-8").splitlines()
    held_out = (tmp_path / "facts-held-out.jsonl").read_text("utf-8").splitlines()
    learnt = {json.loads(line)["completion"] for line in trained}
    assert not [line for line in held_out if json.loads(line)["completion"] in learnt]
    assert "[knowledge + style]" in (tmp_path / "transcript.txt").read_text("utf-8")
    assert (tmp_path / "dialogue.png").read_bytes().startswith(b"\x89PNG")
