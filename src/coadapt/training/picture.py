"""The picture of a run: its loss, and below it how each adapter moved, in how many directions, and behind what gate."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from coadapt.training.log import Points, figures_in, held_out_losses, values_over_steps
from coadapt.training.palette import GREY, HELD_OUT, INK, SPIKE, TRAIN, adapter_colors

End = tuple[float, float, str, str]
"""Where a line ends (x, y), its name, its colour."""

NORMS = {"grad_norm": "gradient norm", "update_norm": "update norm"}
PLAIN = {"effective_rank": "effective rank of the change, mean of sites", "gate": "gate"}
"""Figure -> the title of its panel: on a logarithmic axis, and on a plain one."""
LOSS_HEIGHT, PANEL_HEIGHT, WIDTH = 4.0, 1.5, 7.2
"""Inches."""
LONGEST_NAME = 18


def draw(log: Sequence[Mapping[str, Any]], file: Path, title: str) -> None:
    """Training and held-out loss over steps, spikes marked, and a panel for each figure that was measured, as a PNG.

    The norms are those of each adapter; of a single one, those of each kind of its parameters.

    Args:
        log: what `read_log` gives.
    """
    panels = {figure: found for figure in NORMS if (found := _norms_of(log, figure))}
    panels |= {figure: found for figure in PLAIN if (found := values_over_steps(log, figure))}
    heights = [LOSS_HEIGHT, *(PANEL_HEIGHT for _ in panels)]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    stacked = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    named = [_loss(stacked[0], log, title)]
    adapters = dict.fromkeys(name for line in log for name in figures_in(line))
    colors = adapter_colors(adapters | dict.fromkeys(name for found in panels.values() for name in found))
    for axes, (kind, found) in zip(stacked[1:], panels.items(), strict=True):
        named.append(_panel(axes, found, colors, {**NORMS, **PLAIN}[kind], logarithmic=kind in NORMS))
    stacked[-1].set_xlabel("step", color=GREY)
    figure.draw_without_rendering()
    for axes, ends in zip(stacked, named, strict=True):
        _name(axes, ends)
    figure.savefig(file, format="png")


def _norms_of(log: Sequence[Mapping[str, Any]], figure: str) -> dict[str, Points]:
    whole = norms_in(log, figure)
    if len(whole) != 1:
        return whole
    [name] = whole
    keys = dict.fromkeys(key for line in log for key in line if key.startswith(f"train/{figure}."))
    parts = [key.removeprefix("train/").partition("/")[0] for key in keys]
    return {part.partition(".")[2]: norms_in(log, part)[name] for part in parts} or whole


def norms_in(log: Sequence[Mapping[str, Any]], figure: str) -> dict[str, Points]:
    """As `values_over_steps`, of what is above 0: the axis is logarithmic. One that is 0 throughout has no points."""
    found = values_over_steps(log, figure)
    return {name: [(step, value) for step, value in points if value > 0] for name, points in found.items()}


def smoothed(values: Sequence[float]) -> list[float]:
    """A running mean of running medians over a tenth of the points, centred, shorter at the ends: a spike leaves no
    plateau."""
    half = len(values) // 20

    def along(values: Sequence[float], middle: Callable[[Sequence[float]], float]) -> list[float]:
        return [middle(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]

    return along(along(values, median), fmean)


def spread(heights: Sequence[float], gap: float, floor: float = float("-inf")) -> list[float]:
    """`heights` (ascending) moved as little apart as it takes for neighbours to have `gap` between them, none below
    `floor`."""
    placed = list(heights)
    for _ in range(100):
        for low in range(len(placed) - 1):
            if (short := gap - (placed[low + 1] - placed[low])) > 0:
                placed[low] -= short / 2
                placed[low + 1] += short / 2
    for number, height in enumerate(placed):
        placed[number] = max(height, floor)
        floor = placed[number] + gap
    return placed


def _loss(axes: Any, log: Sequence[Mapping[str, Any]], title: str) -> list[End]:
    train = [(line["step"], line["train/loss"]) for line in log if "train/loss" in line]
    held_out = [(line["step"], line["eval/loss"]) for line in log if "eval/loss" in line]
    ends: list[End] = []
    if train:
        step, loss = _curve(axes, train, TRAIN, 2)
        ends.append((step, loss, f"train {loss:.3g}", TRAIN))
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color=HELD_OUT, linewidth=1, linestyle=":", marker="o", markersize=5)
        ends.append((steps[-1], losses[-1], f"held out {losses[-1]:.3g}", HELD_OUT))
    apart = _apart(log)
    for name, points in apart.items():
        axes.plot(*zip(*points, strict=True), color=HELD_OUT, linewidth=0.8, alpha=0.6, marker="o", markersize=2.5)
        ends.append((*points[-1], f"{_shortened(name)} {points[-1][1]:.3g}", HELD_OUT))
    if spikes := [(line["step"], line["loss"]) for line in log if line.get("event") == "loss_spike"]:
        axes.scatter(*zip(*spikes, strict=True), s=70, facecolors="none", edgecolors=SPIKE, linewidths=1.4, zorder=3)
        ends.append((*spikes[-1], "spike", SPIKE))
    losses = [loss for _, loss in (*train, *held_out, *(point for points in apart.values() for point in points))]
    # Where a linear axis would show a cliff and a floor.
    if losses and min(losses) > 0 and max(losses) > 20 * min(losses):
        _logarithmic(axes, losses)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_ylabel("loss", color=GREY)
    _plain(axes)
    return ends


def _apart(log: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Of several data sets, each one's held-out loss."""
    found: dict[str, Points] = {}
    for line in log:
        for name, loss in held_out_losses(line).items():
            found.setdefault(name, []).append((line["step"], loss))
    return found


def _panel(
    axes: Any, found: Mapping[str, Points], colors: Mapping[str, str], title: str, logarithmic: bool
) -> list[End]:
    ends: list[End] = []
    for name, points in found.items():
        if points:
            ends.append((*_curve(axes, points, colors[name], 1.6), _shortened(name), colors[name]))
    values = [value for points in found.values() for _, value in points]
    if logarithmic and values:
        _logarithmic(axes, values)
    elif values:
        axes.set_ylim(0, 1.1 * max(values))
    last = max((x for x, _, _, _ in ends), default=0)
    # A logarithmic axis has no 0: who stands there is named at its foot.
    ends += [(last, axes.get_ylim()[0], f"{_shortened(n)}: 0", colors[n]) for n, points in found.items() if not points]
    axes.set_title(title, loc="left", color=GREY, fontsize=9)
    axes.tick_params(labelsize=8)
    _plain(axes)
    return ends


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _curve(axes: Any, points: Points, color: str, width: float) -> tuple[float, float]:
    """A line with what it smooths behind it; where it ends."""
    steps, values = zip(*points, strict=True)
    smooth = smoothed(values)
    if smooth != list(values):
        axes.plot(steps, values, color=color, alpha=0.28, linewidth=1)
    few = {"marker": "o", "markersize": 3} if len(points) < 6 else {}
    axes.plot(steps, smooth, color=color, linewidth=width, **few)
    return steps[-1], smooth[-1]


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    within = (1.0, 2.0, 5.0) if max(values) < 30 * min(values) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=within, numticks=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _name(axes: Any, ends: Sequence[End]) -> None:
    """Names at the ends of the lines, which need no legend, and do not touch each other."""
    ends = sorted(ends, key=lambda end: end[1])
    points = 72 / axes.figure.dpi
    heights = [axes.transData.transform((x, y))[1] * points for x, y, _, _ in ends]
    foot = axes.bbox.y0 * points + 6  # above the numbers of the axis
    for (x, y, text, color), height, placed in zip(ends, heights, spread(heights, 13, foot), strict=True):
        place = {"xytext": (8, placed - height), "textcoords": "offset points", "va": "center", "fontsize": 9.5}
        axes.annotate(text, (x, y), color=color, annotation_clip=False, **place)


def _plain(axes: Any) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=GREY, length=0, which="both")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")
