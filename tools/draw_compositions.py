"""Draws the pictures of docs/composition.md and docs/routing.md: python tools/draw_compositions.py [FOLDER]"""

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from coadapt.training.palette import ADAPTERS, GREY, INK, ORANGE

TEAL, PURPLE, RED, BROWN = *ADAPTERS[:3], ADAPTERS[5]
WIDTH = 72
"""Of every picture, in tenths of an inch, which all lengths here are."""
CODE = "DejaVu Sans Mono"
Point = tuple[float, float]


def tint(color: str, share: float = 0.12) -> tuple[float, ...]:
    """The colour on white, as thin as `share`."""
    return tuple(1 - share * (1 - c) for c in to_rgb(color))


class Sheet:
    """A page to draw on; y grows upwards."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH / 10, height / 10), dpi=160)
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, height))
        self.axes.axis("off")

    def text(
        self, at: Point, text: str, color: str = INK, size: float = 10, code: bool = False, ha: str = "center"
    ) -> None:
        family = CODE if code else "DejaVu Sans"
        self.axes.text(*at, text, color=color, size=size, family=family, ha=ha, va="center", zorder=5)

    def box(
        self, left: float, bottom: float, width: float, height: float, color: str, share: float = 0.12,
        above: bool = False,
    ) -> None:  # fmt: skip
        """above: over the arrows."""
        self.axes.add_patch(
            FancyBboxPatch(
                (left, bottom),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.9",
                linewidth=1.4,
                edgecolor=color,
                facecolor=tint(color, share),
                zorder=3 if above else 1,
            )
        )

    def frozen(self, left: float, bottom: float, width: float, height: float, text: str) -> None:
        """A part of the base."""
        self.box(left, bottom, width, height, GREY)
        self.text((left + width / 2, bottom + height / 2), text)

    def arrow(self, *points: Point, color: str = INK, dashed: bool = False, head: bool = True) -> None:
        """Straight from point to point, with a head at the last."""
        style = (0, (3, 2)) if dashed else "-"
        for one, two in itertools.pairwise(points[:-1]):
            self.axes.plot(*zip(one, two, strict=True), color=color, lw=1.3, ls=style, solid_capstyle="round", zorder=2)
        self.axes.add_patch(
            FancyArrowPatch(
                points[-2],
                points[-1],
                arrowstyle="-|>" if head else "-",
                mutation_scale=9,
                color=color,
                linewidth=1.3,
                linestyle=style,
                shrinkA=0,
                shrinkB=0,
                zorder=2,
            )
        )

    def ring(self, at: Point, text: str, color: str = INK, radius: float = 1.9, size: float = 9) -> None:
        """A gate, or the plus where changes are added."""
        self.axes.add_patch(Circle(at, radius, edgecolor=color, facecolor="white", linewidth=1.4, zorder=3))
        self.text(at, text, color, size)

    def cells(
        self, left: float, bottom: float, colors: Sequence[str], share: float = 0.25, below: Sequence[str] = ()
    ) -> None:
        """Tokens, one beside the other; `below`: a second colour in the lower third of each."""
        for number, color in enumerate(colors):
            at = left + 2 * number
            self.axes.add_patch(Rectangle((at, bottom), 1.76, 2, facecolor=tint(color, share), edgecolor=color, lw=0.9))
            for other in below:
                self.axes.add_patch(
                    Rectangle((at, bottom), 1.76, 0.7, facecolor=tint(other, share), edgecolor=other, lw=0.9)
                )


def seq() -> Sheet:
    """Box in box: each adapter stands around all that is inside."""
    sheet = Sheet(24)
    sheet.text((1.5, 22), '"language >> task"', code=True, ha="left", size=11)
    sheet.box(14, 1.5, 44, 18, PURPLE, 0.08)
    sheet.box(19, 3.7, 34, 12.6, TEAL, 0.1)
    sheet.frozen(27, 5.6, 18, 7, "the frozen call $f$")
    sheet.text((15.2, 17.9), "task", PURPLE, code=True, ha="left")
    sheet.text((20.2, 14.6), "language", TEAL, code=True, ha="left")
    sheet.text((56.8, 17.9), "$e_2(e_1(f))$", PURPLE, ha="right")
    sheet.text((51.8, 14.6), "$e_1(f)$", TEAL, ha="right")
    sheet.text((8, 9.1), "$x$", size=13)
    sheet.arrow((10, 9.1), (26.8, 9.1))
    sheet.arrow((45.2, 9.1), (62, 9.1))
    sheet.text((64, 9.1), "$y$", size=13)
    return sheet


def sum_with_gates() -> Sheet:
    """What each adapter would change, times its gate, is added to what the base gives."""
    sheet = Sheet(29)
    sheet.text((1.5, 27), '"task + 0.5*style"', code=True, ha="left", size=11)
    rows = (20.5, 12, 3.8)
    sheet.text((8, rows[0]), "$x$", size=13)
    sheet.arrow((10, rows[0]), (18.8, rows[0]))
    for y in rows[1:]:
        sheet.arrow((13.5, rows[0]), (13.5, y), (18.8, y))
    sheet.frozen(19, rows[0] - 2.5, 22, 5, "the frozen call $f$")
    for y, name, color, gate, formula in (
        (rows[1], "task", TEAL, "1", "$e_1(f) - f$"),
        (rows[2], "style", PURPLE, "0.5", "$e_2(f) - f$"),
    ):
        sheet.box(19, y - 2.5, 22, 5, color)
        sheet.text((20.4, y), name, color, code=True, ha="left")
        sheet.text((39.6, y), formula, color, ha="right")
        sheet.arrow((41.2, y), (46, y), color=color)
        sheet.ring((48, y), gate, color)
        sheet.arrow((50, y), (56.5, y), color=color, head=False)
    sheet.arrow((56.5, rows[2]), (56.5, rows[0] - 2))
    sheet.text((48, rows[1] + 3.1), "gates", GREY, size=9)
    sheet.arrow((41.2, rows[0]), (54.4, rows[0]))
    sheet.ring((56.5, rows[0]), "+", size=13)
    sheet.arrow((58.6, rows[0]), (64, rows[0]))
    sheet.text((66, rows[0]), "$y$", size=13)
    return sheet


def rows_of_a_batch() -> Sheet:
    """One call of the frozen model; what stands around it differs by row."""
    sheet = Sheet(33)
    sheet.text((1.5, 31), 'adapter_names=["a", "b + 0.5*c", "p >> a", None]', code=True, ha="left", size=11)
    lines: tuple[tuple[Sequence[tuple[str, str]], str], ...] = (
        ((("a", TEAL),), ""),
        ((("b", PURPLE), ("0.5*c", RED)), "+"),
        ((("p", BROWN), ("a", TEAL)), ">>"),
        ((), ""),
    )
    sheet.box(30, 1.5, 26, 26.4, GREY, 0.1)
    sheet.text((43, 26), "one call of the frozen base", size=9.5)
    for number, (used, operator) in enumerate(lines):
        y, virtual = 21.4 - number * 5.7, 3 * (operator == ">>")
        sheet.text((1.5, y), f"row {number}", GREY, size=9, ha="left")
        sheet.cells(15 - 2 * virtual, y - 1, [*[BROWN] * virtual, *[GREY] * 6])
        sheet.arrow((28.2, y), (58.2, y))
        for at, (text, color) in enumerate(used):
            left = 38.4 if len(used) == 1 else 32.3 + 12.2 * at
            sheet.box(left, y - 1.7, 9.2, 3.4, color, 0.18, above=True)
            sheet.text((left + 4.6, y), text, color, code=True)
        if operator == "+":
            sheet.ring((43, y), operator, radius=0.9)
        elif operator:
            sheet.text((43, y + 1.3), operator, size=9)
        if not used:
            sheet.text((43, y + 1.3), "as it is", GREY, size=9)
        colors = [color for _, color in used if color != BROWN] or [GREY]
        sheet.cells(59, y - 1, [colors[0]] * 6, share=0.4, below=colors[1:])
    return sheet


def router() -> Sheet:
    """The site's own input makes the gates."""
    sheet = Sheet(47)
    sheet.text((1.5, 45), '"token_router(a, b, c)"', code=True, ha="left", size=11)
    sheet.text((70.5, 45), "at one site", GREY, size=9.5, ha="right")
    top, router_y = 39.3, 14.2
    sheet.text((3, top), "$x$", size=13)
    sheet.arrow((5, top), (14.8, top))
    sheet.frozen(15, top - 2.3, 20, 4.6, "the frozen call $f$")
    for number, (name, color) in enumerate((("a", TEAL), ("b", PURPLE), ("c", RED))):
        y = 32.2 - number * 5.6
        sheet.arrow((9, top), (9, y), (14.8, y))
        sheet.box(15, y - 2, 20, 4, color)
        sheet.text((16.4, y), name, color, code=True, ha="left")
        sheet.text((33.6, y), f"$e_{number + 1}(f) - f$", color, ha="right", size=9.5)
        sheet.arrow((35.2, y), (42.4, y), color=color)
        sheet.ring((44.2, y), f"$g_{number + 1}$", color, radius=1.8)
        sheet.arrow((46.1, y), (54.5, y), color=color, head=False)
    sheet.arrow((35.2, top), (52.4, top))
    sheet.ring((54.5, top), "+", size=13)
    sheet.arrow((56.6, top), (63, top))
    sheet.text((65, top), "$y$", size=13)
    sheet.arrow((54.5, 21), (54.5, top - 2))
    sheet.arrow((9, 21), (9, router_y), (14.8, router_y))
    sheet.box(15, router_y - 2.3, 20, 4.6, ORANGE)
    sheet.text((25, router_y), "softmax($W x + b$)", size=9.5)
    sheet.arrow((35.2, router_y), (44.2, router_y), (44.2, 31), color=ORANGE, dashed=True, head=False)
    _gates_of_tokens(sheet)
    return sheet


def _gates_of_tokens(sheet: Sheet) -> None:
    """A sketch: each token has gates of its own."""
    tokens = ("The", "cat", "sleeps", "in", "the", "garden", ".")
    shares = ((0.6, 0.3), (0.15, 0.75), (0.1, 0.2), (0.35, 0.3), (0.55, 0.3), (0.1, 0.8), (0.4, 0.35))
    for number, (token, (a, b)) in enumerate(zip(tokens, shares, strict=True)):
        left, bottom = 15 + number * 6.6, 3.4
        for share, color in ((a, TEAL), (b, PURPLE), (1 - a - b, RED)):
            sheet.axes.add_patch(Rectangle((left, bottom), 5.6, 6 * share, facecolor=color, edgecolor="white"))
            bottom += 6 * share
        sheet.text((left + 2.8, 1.7), token, size=8.5)
    sheet.text((13.6, 6.4), "gates of\neach token", GREY, size=8.5, ha="right")


PICTURES: dict[str, Callable[[], Sheet]] = {
    "seq": seq,
    "sum": sum_with_gates,
    "rows": rows_of_a_batch,
    "router": router,
}


def main(folder: Path) -> None:
    """Draws every picture."""
    for name, draw in PICTURES.items():
        draw().figure.savefig(folder / f"{name}.png", format="png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "pictures")
