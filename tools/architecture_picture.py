"""Draws the two pictures of docs/architecture.md: python tools/architecture_picture.py [FOLDER]"""

import sys
from pathlib import Path

from draw_compositions import PURPLE, TEAL, Sheet

from coadapt.training.palette import GREY, INK, ORANGE

SITES = {"q": PURPLE, "k": GREY, "v": PURPLE, "o": GREY, "mlp": GREY}
"""What a block has -> the colour of what adapts it; grey where nothing does."""
FLOORS = (
    ("cli", "a file for each verb of the command line"),
    ("demo", "a tiny model and a task for it"),
    ("ui   hub", "pages in a browser; model cards, pushing"),
    ("tuning   serving", "comparing, searching; the server"),
    ("training", "runs: settings, data sets, monitors, checkpoints"),
    ("evaluation   data   exporting", "scores; rows and collators; folders for other programs"),
    ("model", "PeftModel: what a user calls"),
    ("formats   combining   verifying", "files; many adapters into one; does each train?"),
    ("methods", "a file for each method, with its formula"),
    ("inits   quant", "ways for a LoRA to start; quantised bases"),
    ("core", "sites, plans, frames: everything that all methods share"),
    ("config", "what every configuration has; read without torch"),
)
"""Of the package, the highest first: imports run down."""


def call() -> Sheet:
    """The way of a call: what is asked for, down to one frozen layer."""
    sheet = Sheet(76)
    sheet.text((1.5, 73.5), 'view(x, adapters="task + 0.5*style")', code=True, ha="left", size=11)
    sheet.arrow((17, 72), (17, 69.4))
    _composition(sheet)
    sheet.arrow((17, 57.8), (17, 55.2))
    _plan(sheet)
    sheet.arrow((17, 40.8), (17, 38.2))
    sheet.box(1.5, 30, 31, 8, ORANGE)
    sheet.text((3, 36), "frame", ORANGE, code=True, ha="left")
    sheet.text((3, 32.6), "the plan goes along with this call,\non this thread", size=9, ha="left")
    _base(sheet)
    _site(sheet)
    return sheet


def _composition(sheet: Sheet) -> None:
    sheet.box(1.5, 58, 31, 11, INK, 0.04)
    sheet.text((3, 67), "composition", code=True, ha="left")
    sheet.text((3, 60.6), "the text\nas a tree", size=9, ha="left")
    for left, name, gate, color in ((15, "task", "1", TEAL), (24.4, "style", "0.5", PURPLE)):
        sheet.arrow((22.5, 65), (left + 3.4, 62), color=color, head=False)
        sheet.box(left, 59, 6.8, 3, color, above=True)
        sheet.text((left + 3.4, 60.5), name, color, size=9, code=True)
        sheet.text((18.5 if name == "task" else 27.3, 64.2), gate, color, size=8.5)
    sheet.ring((22.5, 66), "+", radius=1.5, size=11)


def _plan(sheet: Sheet) -> None:
    sheet.box(1.5, 41, 31, 14, INK, 0.04)
    sheet.text((3, 53), "plan", code=True, ha="left")
    sheet.text((31, 53), "made once, then looked up", GREY, size=8.5, ha="right")
    lines = (("the input", "task", TEAL), ("layers.0 … q", "0.5 style", PURPLE), ("layers.0 … v", "0.5 style", PURPLE))
    for number, (place, what, color) in enumerate(lines):
        sheet.text((4.5, 50 - 2.6 * number), place, size=9, code=True, ha="left")
        sheet.text((29.5, 50 - 2.6 * number), what, color, size=9, code=True, ha="right")
    sheet.text((4.5, 42.4), "…", size=9, ha="left")


def _base(sheet: Sheet) -> None:
    """The frozen model, from the tokens below to the logits above, with the frame beside it."""
    sheet.box(39, 30, 31.5, 39.5, GREY, 0.08)
    sheet.text((69, 67.4), "base(x)", code=True, ha="right")
    sheet.text((69, 65), "frozen, as it was", GREY, size=8.5, ha="right")
    sheet.arrow((32.5, 34), (42, 34), color=ORANGE, dashed=True, head=False)
    sheet.arrow((42, 34), (42, 54.9), color=ORANGE, dashed=True, head=False)
    sheet.arrow((55, 28.6), (55, 32.9))
    sheet.text((56.5, 29.1), "tokens", GREY, size=8.5, ha="left")
    sheet.box(46, 33, 18, 3.4, TEAL, 0.2, above=True)
    sheet.text((55, 34.7), "the embedded input", size=9)
    sheet.arrow((42, 34.7), (45.8, 34.7), color=ORANGE, dashed=True)
    for number, bottom in enumerate((39.5, 51.5)):
        sheet.arrow((55, bottom - 3.1), (55, bottom - 0.1))
        sheet.box(45, bottom, 24, 9, GREY, 0.16)
        sheet.text((46, bottom + 7.6), f"block {number}", GREY, size=8.5, ha="left")
        for place, (name, color) in enumerate(SITES.items()):
            left = 46 + 4.3 * place
            sheet.box(left, bottom + 1.2, 5 if name == "mlp" else 3.5, 4.4, color, 0.1 if color == GREY else 0.3)
            sheet.text((left + (2.5 if name == "mlp" else 1.75), bottom + 3.4), name, size=9)
        sheet.arrow((42, bottom + 3.4), (45.8, bottom + 3.4), color=ORANGE, dashed=True)
    sheet.arrow((55, 60.6), (55, 63.3))
    sheet.text((55, 64.6), "…", size=12)
    sheet.arrow((55, 65.8), (55, 72))
    sheet.text((56.5, 71.4), "logits", GREY, size=8.5, ha="left")


def _site(sheet: Sheet) -> None:
    """One of its layers, larger."""
    sheet.arrow((56.4, 40.6), (56.4, 38), (66.5, 38), (66.5, 26.1), color=PURPLE)
    sheet.box(1.5, 1.5, 69, 24.5, INK, 0.02, above=False)
    sheet.text((3, 23.6), "site", code=True, ha="left")
    sheet.text(
        (69, 23.6), "no line in the plan for this module: only the upper way, the base's own", GREY, 8.5, ha="right"
    )
    sheet.text((5, 16.6), "$x$", size=13)
    sheet.arrow((7, 16.6), (16.8, 16.6))
    sheet.frozen(17, 14, 22, 5.2, "the frozen layer $f$")
    sheet.arrow((39.2, 16.6), (58.4, 16.6))
    sheet.ring((60.5, 16.6), "+", size=13)
    sheet.arrow((62.6, 16.6), (67, 16.6))
    sheet.text((68.6, 16.6), "$y$", size=13)
    sheet.arrow((11, 16.6), (11, 6.6), (16.8, 6.6))
    sheet.box(17, 4, 22, 5.2, PURPLE)
    sheet.text((18.4, 6.6), "style", PURPLE, code=True, ha="left")
    sheet.text((37.6, 6.6), "$e(f) - f$", PURPLE, ha="right")
    sheet.arrow((39.2, 6.6), (47.8, 6.6), color=PURPLE)
    sheet.ring((50, 6.6), "0.5", PURPLE, radius=2.1)
    sheet.arrow((52.2, 6.6), (60.5, 6.6), (60.5, 14.5), color=PURPLE)
    sheet.text((50, 10.2), "gate", GREY, size=8.5)


def package() -> Sheet:
    """What may import what."""
    sheet = Sheet(5 * len(FLOORS) + 6)
    top = 5 * len(FLOORS) + 2.5
    sheet.text((4, top + 1), "imports run down", GREY, size=8.5, ha="left")
    sheet.arrow((2, top + 1), (2, 2), color=GREY)
    colors = {"methods": PURPLE, "core": TEAL, "model": ORANGE}
    for number, (names, what) in enumerate(FLOORS):
        bottom = top - 4.6 - 5 * number
        color = colors.get(names, GREY)
        sheet.box(4, bottom, 66.5, 4, color, 0.1 if color == GREY else 0.18)
        sheet.text((5.5, bottom + 2), names, INK, code=True, ha="left", size=9.5)
        sheet.text((69, bottom + 2), what, INK, size=8.5, ha="right")
    return sheet


def main(folder: Path) -> None:
    """Draws both."""
    for name, draw in {"call": call, "package": package}.items():
        draw().figure.savefig(folder / f"{name}.png", format="png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "pictures")
