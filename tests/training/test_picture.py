"""The picture: what is drawn, in which colour, and that names at the ends of lines do not touch."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from coadapt.training.palette import HELD_OUT, SPIKE, TRAIN, adapter_colors
from coadapt.training.picture import draw, norms_in, smoothed, spread

SIZE = {"loss": (640, 1152), "with norms": (1120, 1152)}
PANEL = 240
"""Pixels that each further panel is high."""


def log(*names: str, steps: int = 30) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        norms = {
            f"train/{f}/{name}": 1 / (step + n) for n, name in enumerate(names) for f in ("grad_norm", "update_norm")
        }
        lines.append({"step": step, "train/loss": 3 / step, **norms})
    return [*lines, {"step": steps, "eval/loss": 0.5}]


def rgb(color: str) -> Any:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255


def colored(file: Path, color: str) -> tuple[int, int]:
    """Pixels of this colour in the picture of the loss, and below it."""
    near = np.abs(imread(file)[..., :3] - rgb(color)).max(-1) < 0.02
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


@pytest.mark.parametrize("lines", [log(), log("a", "b")[-1:], []])
def test_without_figures_it_is_the_loss_alone(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    draw(lines, tmp_path / "loss.png", "one")
    assert imread(tmp_path / "loss.png").shape[:2] == SIZE["loss"]


@pytest.mark.parametrize(
    ("more", "panels"),
    [
        ({}, 2),
        ({"train/gate/a": 0.5, "train/gate/a + b": 0.25}, 3),
        ({"train/effective_rank/a": 3.0, "train/gate/a": 0.5}, 4),
    ],
)
def test_a_panel_for_each_figure_that_was_measured(more: dict[str, float], panels: int, tmp_path: Path) -> None:
    lines = [{**line, **more} for line in log("a", "b", steps=panels - 1)]  # one point, and a few
    draw(lines, tmp_path / "loss.png", "one")
    assert imread(tmp_path / "loss.png").shape[:2] == (SIZE["loss"][0] + panels * PANEL, 1152)


def test_of_one_adapter_the_kinds_of_its_parameters_are_drawn(tmp_path: Path) -> None:
    file, color = tmp_path / "loss.png", adapter_colors(["task", "A", "B"])
    draw(log("task"), file, "whole")
    assert colored(file, color["task"])[1] > 400 > colored(file, color["A"])[1]
    lines = [{**line, "train/grad_norm.A/task": 0.5, "train/grad_norm.B/task": 2.0} for line in log("task")]
    draw(lines, file, "kinds")
    assert min(colored(file, color[kind])[1] for kind in ("A", "B", "task")) > 400  # the update has no kinds here
    assert imread(file).shape[:2] == SIZE["with norms"]


def test_spikes_are_marked_where_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "loss.png"
    lines = [{**line, "train/loss": 50.0} if line["step"] == 20 and "train/loss" in line else line for line in log()]
    draw(lines, file, "unmarked")
    assert colored(file, SPIKE) == (0, 0)
    draw([*lines, {"step": 20, "event": "loss_spike", "loss": 50.0, "warning": "jumped"}], file, "marked")
    marked = np.argwhere(np.abs(imread(file)[..., :3] - rgb(SPIKE)).max(-1) < 0.02)
    assert len(marked) > 50
    assert marked[:, 0].max() < 150  # where the axis ends that reaches up to the spike
    assert 0.6 < np.median(marked[:, 1]) / 1152 < 0.75


def test_a_spike_does_not_bend_the_line() -> None:
    level = [1.0] * 60
    assert smoothed([*level[:30], 99.0, *level[31:]]) == level
    falling = [3 - step / 60 for step in range(60)]
    assert smoothed(falling)[6:-6] == pytest.approx(falling[6:-6])
    assert smoothed([5.0, 1.0]) == [5.0, 1.0]


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
