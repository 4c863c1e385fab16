"""The MAD-X example runs, from pretraining to its picture, on real sentences."""

import subprocess
import sys
from pathlib import Path

import pytest

from coadapt import PeftConfig

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "assets" / "data" / "sib200"


@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")
def test_the_example_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "madx" / "madx.py"
    command = [sys.executable, "-W", "error", str(script), "--data", str(DATA), "--out", str(tmp_path), "--quick"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split(" | ") for line in (tmp_path / "table.md").read_text("utf-8").splitlines()]
    scores = {cells[0].removeprefix("| "): cells[1:] for cells in lines if len(cells) == 4}
    swapped, left_in = scores["adapters swapped (MAD-X)"], scores["English adapter left in"]
    assert swapped[0] == left_in[0], "on English nothing is swapped"
    losses = {row: [float(cell.split()[0]) for cell in cells] for row, cells in scores.items() if "adapter of" in row}
    assert len(losses) == 3
    assert all(5 < loss < 7 for row in losses.values() for loss in row), "about the logarithm of 400 words"
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for language in ("en", "fr", "sw"):
        config = PeftConfig.from_pretrained(tmp_path / language)
        assert (config.method, getattr(config, "inv_adapter", None)) == ("BOTTLENECK", "nice")
