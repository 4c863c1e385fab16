"""The loss picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

INK, GREY, BLUE, ORANGE = "#222222", "#8a8a8a", "#2b6cb0", "#d9730d"


def draw_loss(log: Sequence[Mapping[str, Any]], file: Path, title: str) -> None:
    """Training and held-out loss over steps, as a PNG. `log` is what `read_log` gives."""
    train = [(line["step"], line["train/loss"]) for line in log if "train/loss" in line]
    held_out = [(line["step"], line["eval/loss"]) for line in log if "eval/loss" in line]
    ends: list[tuple[float, float, str, str]] = []
    figure = Figure(figsize=(7.2, 4.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        smooth = smoothed(losses)
        axes.plot(steps, losses, color=BLUE, alpha=0.28, linewidth=1)
        axes.plot(steps, smooth, color=BLUE, linewidth=2)
        ends.append((steps[-1], smooth[-1], f"train {smooth[-1]:.2f}", BLUE))
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color=ORANGE, linewidth=1, linestyle=":", marker="o", markersize=5)
        ends.append((steps[-1], losses[-1], f"held out {losses[-1]:.2f}", ORANGE))
    _scale(axes, [loss for _, loss in (*train, *held_out)])
    _name(axes, sorted(ends, key=lambda end: end[1]))
    _plain(axes, title)
    figure.savefig(file, format="png")


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean over a tenth of the points, centred, shorter at the ends."""
    half = len(values) // 20
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _scale(axes: Any, losses: Sequence[float]) -> None:
    """Logarithmic where a linear axis would show a cliff and a floor."""
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _name(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the ends of the lines, which need no legend; the lower one is put below where they would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((x, y))[1] for x, y, _, _ in ends]
    touch = len(ends) == 2 and heights[1] - heights[0] < 0.06
    for number, (x, y, text, color) in enumerate(ends):
        lift = (number * 14 - 7) if touch else 0
        place = {"xytext": (8, lift), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, y), color=color, **place)


def _plain(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel("loss", color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=GREY, length=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")
