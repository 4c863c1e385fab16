"""Spikes of the loss: when a logged loss is far above its recent level."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW, FEWEST = 20, 8
"""The level is that of so many logged losses before; with fewer than the second there is none yet."""
DEVIATIONS, SHARE = 6.0, 0.5
NORMAL = 1.4826
"""MAD times this is the standard deviation, where values are normal."""


@dataclass(frozen=True)
class Spike:
    """A loss that is above the bound."""

    loss: float
    level: float
    bound: float


def spike(losses: Sequence[float]) -> Spike | None:
    """The last of `losses`, if it is a spike against those before it.

    It is one if loss > m + max(6 · 1.4826 · MAD, |m| / 2), where m is the median of the 20 logged losses before it and
    MAD the median of their distances to m (Rousseeuw & Croux 1993). Neither moves for a spike or two among the 20. The
    second bound is for a loss that has come to rest, where MAD is next to 0. At least 8 losses are needed. A loss that
    stays up is the level itself after 10.
    """
    *before, last = losses
    before = before[-WINDOW:]
    if len(before) < FEWEST:
        return None
    level = median(before)
    spread = NORMAL * median(abs(loss - level) for loss in before)
    bound = level + max(DEVIATIONS * spread, SHARE * abs(level))
    return Spike(last, level, bound) if last > bound else None


def begins(losses: Sequence[float]) -> Spike | None:
    """As `spike`, where the loss before was none: several in a row are one."""
    return None if len(losses) < 2 or spike(losses[:-1]) else spike(losses)
