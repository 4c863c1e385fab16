"""Rows of several data sets in one batch: how many of each, and which. Each data set's are those of its solo run.

A data set has b rows in each batch, whatever the others do, in an order of its own that is drawn from the run's seed. A
pass over it ends with a shorter batch, and, where a step is made of several batches, with a shorter step: as with that
data set alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, Sampler

from coadapt.data.tokens import IGNORED

Place = tuple[int, int]
"""(data set, row)"""


def temperature_weights(rows: Sequence[int], temperature: float) -> list[float]:
    """n^(1/T), temperature-scaled mixing (arXiv:1910.10683, section 3.5.2, without its limit K).

    T = 1 is examples-proportional mixing, T = inf equal mixing.
    """
    return [n ** (1 / temperature) for n in rows]


def shares(batch: int, weights: Sequence[float]) -> list[int]:
    """Rows of each data set in a batch: as near to the weights as whole numbers of at least 1 come."""
    exact = [batch * weight / sum(weights) for weight in weights]
    found = [max(1, math.floor(part)) for part in exact]
    while (left := batch - sum(found)) != 0:
        moved = [i for i, n in enumerate(found) if left > 0 or n > 1]
        chosen = max(moved, key=lambda i: (exact[i] - found[i]) * (1 if left > 0 else -1))
        found[chosen] += 1 if left > 0 else -1
    return found


@lru_cache(maxsize=64)
def _order(rows: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist())


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The rows of one data set, step by step.

    Args:
        rows: in the data set.
        batch: of these in each batch.
        accumulation: batches that a step is made of.
        start, stop: the steps in which they are drawn, without the last; None: to the end.
    """

    rows: int
    batch: int
    accumulation: int
    seed: int
    start: int = 0
    stop: int | None = None

    @property
    def batches(self) -> int:
        """Of one pass."""
        return math.ceil(self.rows / self.batch)

    @property
    def steps(self) -> int:
        """Of one pass."""
        return math.ceil(self.batches / self.accumulation)

    def end(self, passes: float) -> int:
        """The step at which it has been passed over so often, or is drawn no more."""
        return self.start + math.ceil(passes * self.steps) if self.stop is None else self.stop

    def drawn(self, step: int) -> list[Sequence[int]]:
        """The rows of each batch of a step; no batch where it is not drawn."""
        if step < self.start or (self.stop is not None and step >= self.stop):
            return []
        passed, within = divmod(step - self.start, self.steps)
        # The order that accelerate's sampler draws in the epoch of this number.
        order = _order(self.rows, self.seed + passed)
        first = within * self.accumulation
        numbers = range(first, min(first + self.accumulation, self.batches))
        return [order[n * self.batch : (n + 1) * self.batch] for n in numbers]


class Steps(Protocol):
    """From a step to another, without the last; None: to the end."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int | None: ...


def streams(
    rows: Sequence[int], sizes: Sequence[int], accumulation: int, seed: int, spans: Sequence[Steps]
) -> list[Stream]:
    """Of data sets with so many rows, so many of them in each batch, drawn in these steps."""
    return [
        Stream(rows=n, batch=size, accumulation=accumulation, seed=seed, start=span.start, stop=span.stop)
        for n, size, span in zip(rows, sizes, spans, strict=True)
    ]


class Mixture(Dataset[tuple[int, Any]]):
    """The rows of all data sets, by place. A row below 0 is ~row without anything that is trained on."""

    def __init__(self, sets: Mapping[str, Any]) -> None:
        self.sets = dict(sets)
        self._rows = list(sets.values())

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows)

    def __getitem__(self, place: Place) -> tuple[int, Any]:
        dataset, number = place
        if number >= 0:
            return dataset, self._rows[dataset][number]
        row = self._rows[dataset][~number]
        return dataset, {**row, "labels": [IGNORED] * len(row["labels"])}


class Batches(Sampler[list[Place]]):
    """The batches of one epoch: a pass over the data set that takes the most steps; the others begin again meanwhile.

    One in which no data set is drawn is empty.

    Args:
        step: says, where an epoch begins, the step that comes next; so no wrapper around has to hand an epoch on.
        among: so many processes, which take turns. With more than one, each pass over the one data set that there is
            ends with rows that are not trained on, so that none has less to compute than the others.
    """

    drop_last = False

    streams: tuple[Stream, ...]

    def __init__(self, streams: Sequence[Stream], step: Callable[[], int], among: int = 1) -> None:
        self.step, self.streams, self.among = step, tuple(streams), among
        self.steps = max(stream.steps for stream in streams)
        self.accumulation = streams[0].accumulation
        self.batch_size = sum(stream.batch for stream in streams)
        self.sampler = self  # where accelerate looks for one

    def __len__(self) -> int:
        first, *others = self.streams
        if others:
            return self.steps * self.accumulation
        return math.ceil(first.batches / self.among) * self.among

    def __iter__(self) -> Iterator[list[Place]]:
        drawn = islice(self._drawn(), len(self))
        return drawn if self.among == 1 else map(self._filled, drawn)

    def _filled(self, batch: list[Place]) -> list[Place]:
        return [*batch, *[(0, ~(n % self.streams[0].rows)) for n in range(self.batch_size - len(batch))]]

    def _drawn(self) -> Iterator[list[Place]]:
        epoch = self.step() // self.steps
        for step in range(epoch * self.steps, (epoch + 1) * self.steps):
            drawn = [stream.drawn(step) for stream in self.streams]
            for number in range(self.accumulation):
                yield [(d, row) for d, found in enumerate(drawn) if number < len(found) for row in found[number]]
