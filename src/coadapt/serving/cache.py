"""The keys and values of a running batch. Rows come, go and grow by a token, and hardly anything is copied for that."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

AHEAD = 64
"""Columns that are made at a time, at least, for tokens to come."""


def windows(config: Any) -> list[int | None]:
    """What each layer of a model's cache looks back on: so many tokens, or all.

    Raises:
        ValueError: a layer keeps something else than the keys and values of each token.
    """
    found: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer and not _chunked(config):
            found.append(int(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            found.append(None)
        else:
            kind = "chunks of the text" if isinstance(layer, DynamicLayer) else type(layer).__name__
            raise ValueError(
                f"Models of type {config.model_type!r} cannot be served: their cache has {kind}, where rows that come "
                "and go cannot be put beside each other. Ask it with: coadapt generate"
            )
    return found


def _chunked(config: Any) -> bool:
    return "chunked_attention" in (getattr(config.get_text_config(decoder=True), "layer_types", None) or ())


def plain(layers: int) -> Cache:
    """An empty cache that keeps all tokens at every layer; masks see to windows."""
    return Cache(layers=[DynamicLayer() for _ in range(layers)])


class _Layer(CacheLayerMixin):
    """One layer's keys and values, (rows, H, columns, D); a row's last token stands in column `of.end` - 1."""

    def __init__(self, of: "RowCache", window: int | None) -> None:
        super().__init__()
        self.of, self.window = of, window
        self.is_sliding = window is not None  # which layer transformers makes the mask of a window for

    @property
    def first(self) -> int:
        """The first column that a token which comes now can see."""
        return self.of.start if self.window is None else max(self.of.start, self.of.end - self.window + 1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("made when a row joins")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes what comes behind `end`, which a step that fails leaves where it was."""
        assert self.keys is not None and self.values is not None
        part, first, at = self.of.part, self.first, self.of.end
        end = at + key_states.shape[2]
        self.keys[part, :, at:end] = key_states
        self.values[part, :, at:end] = value_states
        return self.keys[part, :, first:end], self.values[part, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.of.end - self.first + query_length, self.first - self.of.start

    def get_seq_length(self) -> int:
        return self.of.end - self.of.start

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window


class RowCache(Cache):
    """Rows of unequal lengths that end in one column, so that each step writes one column for all.

    Columns `start` to `end` are in use. What a row does not fill of them, on its left, is zeros, and masked.
    """

    layers: list[_Layer]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.start = self.end = 0
        self.lengths: list[int] = []
        """Tokens of each row, virtual ones among them."""
        self.part = slice(0, 0)
        """The rows that the next call is of."""
        super().__init__(layers=[_Layer(self, window) for window in windows])

    @property
    def width(self) -> int:
        """Columns in use."""
        return self.end - self.start

    def join(self, filled: Any, which: Sequence[int], lengths: Sequence[int]) -> None:
        """Appends rows `which` of a cache, where each ends in the last column and has so many tokens."""
        if not lengths:
            return
        at, most = len(self.lengths), max(lengths)
        self._make_room(at + len(lengths), most, filled)
        for layer, other in zip(self.layers, filled.layers, strict=True):
            for mine, theirs in ((layer.keys, other.keys), (layer.values, other.values)):
                assert mine is not None and theirs is not None
                mine[:at, :, self.end - most : self.start] = 0  # nothing, unless these rows are longer than all others
                for slot, (row, length) in enumerate(zip(which, lengths, strict=True), at):
                    mine[slot, :, self.start : self.end - length] = 0
                    mine[slot, :, self.end - most : self.end - length] = 0
                    mine[slot, :, self.end - length : self.end] = theirs[row, :, -length:]
        self.lengths += lengths
        self.start = min(self.start, self.end - most)

    def leave(self, row: int) -> None:
        """Takes a row out; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self.layers:
                for tensor in (layer.keys, layer.values):
                    assert tensor is not None
                    tensor[row, :, self.start : self.end] = tensor[last, :, self.start : self.end]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        self.start = self.end - max(self.lengths, default=0)

    def ready(self) -> None:
        """Makes room for one more token in each row."""
        self._make_room(len(self.lengths), 0, self)

    def grown(self) -> None:
        """Each row has one more token now."""
        self.end += 1
        self.lengths = [n + 1 for n in self.lengths]

    def release(self) -> None:
        """Gives the memory back; there are no rows."""
        assert not self.lengths
        self.start = self.end = 0
        for layer in self.layers:
            layer.keys = layer.values = None

    def _make_room(self, rows: int, longest: int, like: Any) -> None:
        """Room for so many rows, the longest of which has so many tokens, and for one column more."""
        mine = self.layers[0].keys
        there = (0, 0) if mine is None else (mine.shape[0], mine.shape[2])
        if rows <= there[0] and longest <= self.end < there[1]:
            return
        width, count = max(self.width, longest), len(self.lengths)
        new_rows = there[0] if rows <= there[0] else max(rows, 2 * there[0])
        columns, shift = width + max(AHEAD, width // 4), width - self.end
        made: list[tuple[_Layer, str, Tensor]] = []  # all of it, before anything is changed: memory may not be enough
        for layer, other in zip(self.layers, like.layers, strict=True):
            for name in ("keys", "values"):
                old, shaped = getattr(layer, name), getattr(other, name)
                new = shaped.new_zeros(new_rows, shaped.shape[1], columns, shaped.shape[3])
                if old is not None:
                    new[:count, :, self.start + shift : width] = old[:count, :, self.start : self.end]
                made.append((layer, name, new))
        for layer, name, new in made:
            setattr(layer, name, new)
        self.start, self.end = self.start + shift, width


def last_columns(lengths: Tensor, width: int) -> Tensor:
    """(B, width) 1 for the columns that rows of these lengths fill, on the right."""
    return (torch.arange(width, device=lengths.device) >= width - lengths[:, None]).long()
