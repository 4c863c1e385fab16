"""The colours that a thing has wherever it is drawn, on the screen and in the picture."""

from collections.abc import Iterable

INK, GREY, BLUE, ORANGE = "#222222", "#8a8a8a", "#2b6cb0", "#d9730d"
TRAIN, HELD_OUT, SPIKE = BLUE, ORANGE, "#c92a2a"

ADAPTERS = ("#0d9488", "#9d4edd", "#c2255c", "#7a8b00", "#5c6bc0", "#8d6e63")
"""One after the other, in the order in which a run names its adapters; readable on white and on black."""


def adapter_colors(names: Iterable[str]) -> dict[str, str]:
    """Adapter -> its colour."""
    return {name: ADAPTERS[number % len(ADAPTERS)] for number, name in enumerate(names)}
