"""The pictures of a comparison, as SVG text."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from coadapt.training.palette import ADAPTERS, BLUE, GREY, INK, ORANGE
from coadapt.training.picture import spread as apart
from coadapt.tuning.outcome import COSTS, WRITE, Compared, Entrant
from coadapt.tuning.spread import front, surely_beaten

COLORS = (BLUE, ORANGE, *ADAPTERS)
LOGARITHMIC = ("parameters", "peak_bytes")


def colors(found: Compared) -> dict[str, str]:
    """Method -> its colour in all pictures."""
    return {one.name: COLORS[number % len(COLORS)] for number, one in enumerate(found.entrants)}


def svg(figure: Figure) -> str:
    """The figure as SVG that looks alike everywhere: letters are drawn, not named."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "coadapt"}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    return file.getvalue()


def against_costs(found: Compared) -> Figure:
    """The score against each cost: means with their intervals, and the line of those that no other mean beats.

    Hollow is what is clearly behind another method that costs no more.
    """
    costs = {f: c for f in COSTS if len(c := _costs(found, f)) == len(found.scored)}
    figure = Figure(figsize=(9.6, 3.6 * ((len(costs) + 1) // 2)), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots((len(costs) + 1) // 2, 2, squeeze=False).ravel()
    shades = colors(found)
    placed: list[tuple[Any, list[tuple[float, float, str]]]] = []
    for axes, (figure_name, values) in zip(panels, costs.items(), strict=False):
        placed.append((axes, _cost_panel(axes, found, figure_name, values, shades)))
    for axes in panels[len(costs) :]:
        axes.set_visible(False)
    figure.draw_without_rendering()
    for axes, points in placed:
        _name(axes, points, shades)
    return figure


def _costs(found: Compared, figure: str) -> dict[str, float]:
    each = {name: found.entrant(name).cost(figure) for name in found.scored}
    return {name: cost.mean for name, cost in each.items() if cost is not None}


def _cost_panel(
    axes: Any, found: Compared, figure: str, costs: Mapping[str, float], shades: Mapping[str, str]
) -> list[tuple[float, float, str]]:
    _, told = found.judged
    means = {name: one.score.mean for name, one in told.items()}
    hollow = surely_beaten(costs, found.scored, found.metric.higher_is_better)
    if figure in LOGARITHMIC and max(costs.values()) > 3 * min(costs.values()):
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    line = front(costs, means, found.metric.higher_is_better)
    if len(line) > 1:
        axes.plot([costs[n] for n in line], [means[n] for n in line], color="#c8c8c8", linewidth=1.2, zorder=1)
    for name, one in told.items():
        x, color = costs[name], shades[name]
        axes.plot([x, x], [one.score.low, one.score.high], color=color, linewidth=1.4, zorder=2)
        deviation = getattr(found.entrant(name).cost(figure), "deviation", None)
        if deviation:
            axes.plot([x - deviation, x + deviation], [one.score.mean] * 2, color=color, linewidth=1.4, zorder=2)
        face = "white" if name in hollow else color
        axes.scatter([x], [one.score.mean], s=42, facecolors=face, edgecolors=color, linewidths=1.6, zorder=3)
    axes.set_xlabel(COSTS[figure], color=GREY)
    axes.set_ylabel(found.score, color=GREY)
    write = WRITE[figure]
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.margins(x=0.12, y=0.12)
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=6))
    else:
        scale = _unit(max(costs.values())) if figure == "peak_bytes" else 1
        low, high = (value / scale for value in axes.get_xlim())
        inside = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
        axes.xaxis.set_major_locator(FixedLocator([tick * scale for tick in inside]))
    _plain(axes)
    return [(costs[name], means[name], name) for name in told]


def _unit(most: float) -> int:
    """Bytes of the unit that `size` writes so many in."""
    return 2**30 if most >= 2**30 / 10 else 2**20 if most >= 2**20 / 10 else 2**10


def _name(axes: Any, points: Sequence[tuple[float, float, str]], shades: Mapping[str, str]) -> None:
    """Names beside the points, on the side with more room, moved apart where they would touch."""
    at = {name: axes.transData.transform((x, y)) for x, y, name in points}
    scale, middle = 72 / axes.figure.dpi, axes.bbox.x0 + axes.bbox.width / 2
    for side in (-1, 1):
        mine = sorted((n for n in at if (at[n][0] > middle) == (side < 0)), key=lambda n: at[n][1])
        heights = [at[n][1] * scale for n in mine]
        for name, height, placed in zip(mine, heights, apart(heights, 11), strict=True):
            x, y = next((x, y) for x, y, n in points if n == name)
            axes.annotate(
                name,
                (x, y),
                xytext=(side * 5, placed - height + 4),  # above, where neither of its bars is
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="bottom",
                fontsize=9,
                color=shades[name],
            )


def learning_curves(found: Compared) -> Figure:
    """The validation loss over steps: the mean of the seeds, and from the least to the most of them as a band."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.subplots()
    shades = colors(found)
    ends: list[tuple[float, float, str]] = []
    for one in found.entrants:
        if (curves := _curves(one)) is None:
            continue
        steps, losses = curves
        axes.plot(steps, losses.mean(0), color=shades[one.name], linewidth=1.8, label=one.name)
        axes.fill_between(steps, losses.min(0), losses.max(0), color=shades[one.name], alpha=0.16, linewidth=0)
        ends.append((steps[-1], float(losses[:, -1].mean()), one.name))
    lows = [float(c[1].min()) for one in found.entrants if (c := _curves(one)) is not None]
    highs = [float(c[1].max()) for one in found.entrants if (c := _curves(one)) is not None]
    if lows and min(lows) > 0 and max(highs) > 8 * min(lows):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel("validation loss", color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    figure.draw_without_rendering()
    _name_ends(axes, ends, shades)
    return figure


def _curves(one: Entrant) -> tuple[list[float], Any] | None:
    """(steps, losses of each seed), at the steps that all seeds were evaluated at."""
    curves = [{p[0]: p[1] for p in result.curve or ()} for result in one.good.values()]
    if not curves:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return (steps, np.asarray([[curve[s] for s in steps] for curve in curves])) if steps else None


def _name_ends(axes: Any, ends: Sequence[tuple[float, float, str]], shades: Mapping[str, str]) -> None:
    ordered = sorted(ends, key=lambda end: end[1])
    scale = 72 / axes.figure.dpi
    heights = [axes.transData.transform((x, y))[1] * scale for x, y, _ in ordered]
    floor = axes.bbox.y0 * scale + 5
    for (x, y, name), height, placed in zip(ordered, heights, apart(heights, 12, floor), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(7, placed - height),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=shades[name],
            annotation_clip=False,
        )


def rates_tried(found: Compared) -> Figure | None:
    """The validation loss of each rate that was tried, the chosen one filled; None where none was."""
    tuned = [one for one in found.entrants if one.tuned]
    if not tuned:
        return None
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes: Any = figure.subplots()
    shades, ends = colors(found), list[tuple[float, float, str]]()
    for one in tuned:
        points = [(f, r.validation_loss) for f, r in sorted(one.tuned.items()) if r.validation_loss is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=shades[one.name], linewidth=1.2)
        for factor, loss in points:
            face = shades[one.name] if factor == one.chosen else "white"
            axes.scatter([factor], [loss], s=36, facecolors=face, edgecolors=shades[one.name], linewidths=1.5, zorder=3)
        ends.append((points[-1][0], points[-1][1], one.name))
    axes.set_xscale("log")
    factors = sorted({factor for one in tuned for factor in one.tuned})
    axes.set_xticks(factors, [f"{factor:.3g}" for factor in factors])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rates, in times of the defaults", color=GREY)
    axes.set_ylabel("validation loss", color=GREY)
    _plain(axes)
    figure.draw_without_rendering()
    _name_ends(axes, ends, shades)
    return figure


def _plain(axes: Any) -> None:
    axes.tick_params(colors=INK, length=0, which="both", labelsize=8.5)
    axes.grid(axis="y", color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")
