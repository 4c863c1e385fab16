"""The rows that are written at the moment, each with its own adapters, and the call that gives each its next token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from coadapt.core.composition import key

from .cache import RowCache, last_columns, plain
from .request import Chosen, Hear, Request
from .sampling import Numbers, Ways
from .served import Model, Served
from .shelf import Entry
from .text import Spelling

KEPT = 32
"""Compositions that no row has, at most, for which a call is made ready all the same: making it ready takes time."""


@dataclass(kw_only=True, eq=False)
class Row:
    """A request on its way."""

    request: Request
    hear: Hear
    entries: Sequence[Entry]
    """The adapters that it named."""
    numbers: Numbers
    spelling: Spelling
    node: Any
    """Its composition, in the names of the shelf."""
    served: Served = None  # type: ignore[assignment]
    """The same, ready; from when its adapters are there."""
    taken: bool = False
    """Whether they are kept for it."""
    cancelled: bool = False
    written: int = 0
    last: int = 0
    """The token that it was given last."""
    chosen: list[Chosen] = field(default_factory=list)
    """Tokens that no piece has told of yet."""

    @property
    def length(self) -> int:
        """Tokens in the cache when its prompt was read, virtual ones among them."""
        return self.served.virtual + len(self.request.tokens)


class Batch:
    """Rows that are decoded together."""

    def __init__(self, model: Model) -> None:
        self.model, self.base = model, model.view.get_base_model()
        self.device: torch.device = self.base.device  # type: ignore[assignment]
        self.cache = RowCache(model.windows)
        self.rows: list[Row] = []
        self._settled = False
        self._known: dict[Any, Served] = {}
        """What the last call was made ready for: compositions of its rows, and of some before."""

    def join(self, rows: Sequence[Row], filled: Cache, which: Sequence[int]) -> None:
        """Takes in rows whose prompts were read: those at `which` of a cache, with their first token chosen."""
        self.cache.join(filled, which, [row.length for row in rows])
        self.rows += rows
        self._settled = False

    def leave(self, gone: Sequence[Row]) -> None:
        """Takes rows out."""
        for at in sorted((i for i, row in enumerate(self.rows) if row in gone), reverse=True):
            self.cache.leave(at)
            self.rows[at] = self.rows[-1]
            self.rows.pop()
            self._settled = False
        if not self.rows:
            self.cache.release()

    def settle(self) -> None:
        """Before a step: room for it, and what holds until rows come or go."""
        self.cache.ready()
        if self._settled:
            return
        self.ways = Ways([row.request for row in self.rows], self.device)
        self._lengths = torch.tensor(self.cache.lengths, device=self.device)
        self._context = self._ready()
        self._settled = True

    def next_scores(self, begin: int, end: int, tokens: Tensor) -> Tensor:
        """(rows, V) what comes next in the rows from `begin` to `end`, whose last tokens are `tokens`, (rows, 1).

        The cache is as before until `grown`, so a call that fails can be made again, of fewer rows.
        """
        cache, whole = self.cache, end - begin == len(self.rows)
        lengths = self._lengths if whole else self._lengths[begin:end]
        cache.part = slice(begin, end)
        inputs: dict[str, Any] = {"input_ids": tokens, "past_key_values": cache, "use_cache": True}
        if min(cache.lengths[begin:end]) < cache.width:
            inputs["attention_mask"] = last_columns(lengths + 1, cache.width + 1)
        if self.model.placed:
            inputs["position_ids"] = lengths[:, None]
        with self._context if whole else self._running(self.rows[begin:end]):
            return self.base(**inputs).logits[:, -1]

    def grown(self) -> None:
        """The tokens of this step are in the cache, of all rows."""
        self.cache.grown()
        self._lengths += 1

    def forget(self) -> None:
        """To be called when an adapter goes."""
        self._known = {}

    def _ready(self) -> Any:
        """For all rows: made ready for their compositions, and for those that are likely to come back."""
        here = {key(row.served.goes_on): row.served for row in self.rows}
        if not here.keys() <= self._known.keys():
            kept = [(k, s) for k, s in self._known.items() if k not in here and not s.joins]
            self._known = dict([*kept[-KEPT:], *here.items()])
        elif any(s.joins for k, s in self._known.items() if k not in here):
            self._known = {k: s for k, s in self._known.items() if k in here or not s.joins}
        if len(here) == 1:
            return running(self.model, [self.rows[0].served.goes_on])
        at = {k: i for i, k in enumerate(self._known)}
        every = [s.goes_on for s in self._known.values()]
        return self.model.view.running_rows(every, [at[key(row.served.goes_on)] for row in self.rows])

    def _running(self, rows: Sequence[Row]) -> Any:
        return running(self.model, [row.served.goes_on for row in rows])


def running(model: Model, nodes: Sequence[Any]) -> Any:
    """Context: calls of the base have one composition a row."""
    if len({key(node) for node in nodes}) == 1:
        return model.view.running(nodes[0], None, (), {})
    return model.view.running(None, list(nodes), (), {})


class Filling:
    """Prompts that are being read: several short ones at once, or a long one in parts."""

    def __init__(self, model: Model, rows: Sequence[Row]) -> None:
        self.model, self.rows = model, list(rows)
        self.base: Any = model.view.get_base_model()
        self.cache = plain(len(model.windows))
        self.done = 0
        """Columns of the prompts that were read."""
        width = max(len(row.request.tokens) for row in rows)
        self.ids = torch.tensor(
            [[*[row.request.tokens[0]] * (width - len(row.request.tokens)), *row.request.tokens] for row in rows],
            device=self.base.device,
        )
        self.lengths = torch.tensor([len(row.request.tokens) for row in rows], device=self.base.device)

    def read(self, columns: int) -> Tensor | None:
        """Reads on, at most so many tokens of each row; at the end of the prompts (rows, V), what comes next."""
        width, first = self.ids.shape[1], self.done == 0
        end = width if len(self.rows) > 1 else min(self.done + columns, width)
        virtual = 0 if first else self.rows[0].served.virtual
        mask = last_columns(self.lengths, width)[:, :end]
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, self.done :] + virtual
        inputs: dict[str, Any] = {"input_ids": self.ids[:, self.done : end]}
        inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), virtual), mask], dim=1)
        if self.model.placed:
            inputs["position_ids"] = places
        if self.model.keeps:
            inputs["logits_to_keep"] = 1
        nodes = [row.served.node if first else row.served.goes_on for row in self.rows]
        with running(self.model, nodes):
            scores = self.base(past_key_values=self.cache, use_cache=True, **inputs).logits[:, -1]
        self.done = end
        return scores if end == width else None
