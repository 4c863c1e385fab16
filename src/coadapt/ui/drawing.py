"""Lines over steps as SVG, for the page: transparent, in colours that are readable on white and on black."""

import io
import math
import threading
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from coadapt.training.palette import GREY
from coadapt.ui import shown
from coadapt.ui.curves import Points

WIDE, SMALL = (9.6, 2.7), (4.4, 1.8)
"""Inches; the page makes them as wide as there is room."""
FEW = 1.3
"""Powers of ten below which a logarithmic axis shows numbers between them, too."""
_drawing = threading.Lock()
"""matplotlib's settings are those of the whole process, and several pages may be open."""


def plot(
    title: str,
    points: Points,
    colors: Mapping[str, str],
    *,
    size: tuple[float, float] = SMALL,
    logarithmic: bool = False,
) -> str:
    """Lines with their title and what each is; nothing where there are none."""
    finite = {n: [(s, v) for s, v in line if math.isfinite(v)] for n, line in points.items()}
    if not any(finite.values()):
        return ""
    with _drawing, rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 8}):
        svg = _svg(finite, colors, size, logarithmic)
    names = "".join(f'<span><i style="background:{colors[name]}"></i>{shown.escape(name)}</span>' for name in finite)
    head = f'<div class="ca-title">{shown.escape(title)}</div>'
    return f'<div class="ca-plot">{head}{svg}<div class="ca-legend">{names}</div></div>'


def _svg(points: Points, colors: Mapping[str, str], size: tuple[float, float], logarithmic: bool) -> str:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for name, line in points.items():
        steps, values = [step for step, _ in line], [value for _, value in line]
        axes.plot(steps, values, color=colors[name], linewidth=1.6, marker="o" if len(line) == 1 else "", markersize=4)
    if logarithmic:
        every = [value for line in points.values() for _, value in line]
        near = math.log10(max(every) / min(every)) < FEW
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value < 1e-3 else f"{value:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(colors=GREY, which="both", length=0)
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[:].set_visible(False)
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return "<svg" + written.getvalue().partition("<svg")[2]
