"""The picture: what is drawn, in which colour, and that names at the ends of lines do not touch."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from coadapt.training.palette import HELD_OUT, TRAIN, adapter_colors
from coadapt.training.picture import draw, norms_in, spread

SIZE = {"loss": (640, 1152), "with norms": (1120, 1152)}


def log(*names: str, steps: int = 30) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        norms = {
            f"train/{f}/{name}": 1 / (step + n) for n, name in enumerate(names) for f in ("grad_norm", "update_norm")
        }
        lines.append({"step": step, "train/loss": 3 / step, **norms})
    return [*lines, {"step": steps, "eval/loss": 0.5}]


def colored(file: Path, color: str) -> tuple[int, int]:
    """Pixels of this colour in the picture of the loss, and below it."""
    pixels = imread(file)[..., :3]
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    near = np.abs(pixels - wanted).max(-1) < 0.02
    cut = SIZE["loss"][0] - 60
    return int(near[:cut].sum()), int(near[cut:].sum())


def test_each_adapter_has_its_colour_below_the_loss(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    draw(log("a", "b"), file, "two")
    assert imread(file).shape[:2] == SIZE["with norms"]
    for color in (TRAIN, HELD_OUT):
        above, below = colored(file, color)
        assert above > 100 > below
    for color in adapter_colors(["a", "b"]).values():
        above, below = colored(file, color)
        assert below > 400 > above


@pytest.mark.parametrize("lines", [log(), log("alone"), log("alone", steps=1), log("a", "b")[-1:], []])
def test_one_adapter_or_none_is_the_loss_alone(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    draw(lines, tmp_path / "loss.png", "one")
    assert imread(tmp_path / "loss.png").shape[:2] == SIZE["loss"]


def test_an_adapter_at_0_is_named_though_the_axis_has_no_0(tmp_path: Path) -> None:
    lines = [{**line, **({"train/update_norm/b": 0.0} if "train/loss" in line else {})} for line in log("a", "b")]
    found = norms_in(lines, "update_norm")
    assert (len(found["a"]), found["b"]) == (30, [])
    assert len(norms_in(lines, "grad_norm")["b"]) == 30
    draw(lines, tmp_path / "zero.png", "two")
    lines = [{k: v for k, v in line.items() if k != "train/update_norm/b"} for line in lines]
    draw(lines, tmp_path / "without.png", "two")
    color = adapter_colors(["a", "b"])["b"]
    assert colored(tmp_path / "zero.png", color)[1] > colored(tmp_path / "without.png", color)[1]


@pytest.mark.parametrize("heights", [[], [5.0], [0.0, 100.0], [1.0, 1.0, 1.0], [0.0, 3.0, 30.0, 31.0, 33.0]])
def test_names_keep_apart_and_stay_in_order(heights: list[float]) -> None:
    placed = spread(heights, 13)
    assert all(high - low > 12.9 for low, high in itertools.pairwise(placed))
    assert sum(placed) == pytest.approx(sum(heights))
    assert spread([0.0, 100.0], 13) == [0.0, 100.0]
    above = spread(heights, 13, 20.0)
    assert all(high - low >= 13 for low, high in itertools.pairwise(above))
    assert all(height >= 20 for height in above)
