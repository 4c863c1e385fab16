"""What a combination did at each site, as numbers and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHOWN = 12
"""As many sites as a printed report lists; of more, only the worst."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site."""

    path: str
    how: str
    rank: int | None = None
    """Of the result; None where that is no matrix."""
    lost: float | None = None
    """|result - wanted| / |wanted|, where `wanted` is what `how` stands for: what the rank cuts off. None: unknown."""
    apart: float | None = None
    """|result - sum| / |sum|: how far the result is from the composition's own change (for "mean", from their mean)."""
    norm: float = 0.0
    """|sum| (Frobenius)."""

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        return (self.path, self.how, "" if self.rank is None else str(self.rank), _shown(self.lost), _shown(self.apart))


HEAD = ("site", "how", "rank", "lost", "from the sum")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a composition. Printed, it is a table."""

    adapter_name: str
    composition: str = ""
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    @property
    def exact(self) -> bool:
        """Whether the new adapter computes what the composition does, up to rounding."""
        return all(row.apart is not None and row.apart < 1e-5 for row in self.rows)

    @property
    def lost(self) -> float | None:
        """The `apart` of all sites together: |result - sum| / |sum| over all of them. None where it is unknown."""
        if any(row.apart is None for row in self.rows):
            return None
        total = math.sqrt(sum(row.norm**2 for row in self.rows))
        off = math.sqrt(sum(((row.apart or 0.0) * row.norm) ** 2 for row in self.rows))
        return off / total if total else off

    def worst(self, most: int = SHOWN) -> list[Row]:
        """The sites that are furthest from the sum, worst first."""
        return sorted(self.rows, key=lambda row: -(math.inf if row.apart is None else row.apart))[:most]

    @property
    def shown(self) -> tuple[list[Row], str]:
        """The sites that are worth a line, and what to say of the others: few are all listed, of many the worst."""
        if len(self.rows) <= SHOWN:
            return list(self.rows), ""
        if self.exact:
            return [], "Nothing is lost at any site."
        return self.worst(5), f"The 5 of {len(self.rows)} sites that are furthest off."

    def summary(self) -> str:
        """One line."""
        ranks = sorted({row.rank for row in self.rows if row.rank is not None})
        rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
        off = self.lost
        how = "exact" if self.exact else "error unknown" if off is None else f"{100 * off:.3g} % from the sum"
        ways = ", ".join(dict.fromkeys(row.how for row in self.rows))
        return (
            f"{self.adapter_name!r} = {self.composition} by {ways}: "
            f"{len(self.rows)} site{'s' * (len(self.rows) != 1)}{rank}, {how}"
        )

    def __str__(self) -> str:
        rows, rest = self.shown
        lines = [HEAD, *(row.cells for row in rows)] if rows else []
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))] if lines else []
        table = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.summary(), *table, *([rest] if rest else []), *self.notes])


def _shown(share: float | None) -> str:
    return "?" if share is None else "0" if share < 1e-9 else f"{share:.2e}"
