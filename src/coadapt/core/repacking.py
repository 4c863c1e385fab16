"""Merging into quantised layers: into their weights as floats, or into what holds them; and what is lost either way."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer import Around
from .store import Packed, float_form, form_of, packed_store, quantised, store_of, take_form

INTO = ("dequantised", "quantised")
"""Which base a merge goes into, where that is quantised."""


class Full(Around):
    """A quantised layer whose weight is read in full precision."""

    def weight(self) -> Tensor:
        return self.inner.weight().float()

    def like(self) -> Tensor:
        return self.inner.like().float()


@dataclass(frozen=True, kw_only=True)
class Repacked:
    """One layer: the lengths (Frobenius) of what was to change, and of what either way loses of the wanted weight."""

    path: str
    weight: float
    change: float
    dequantised: float
    quantised: float | None
    """None where it cannot be quantised anew."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What became of a merge into a quantised base. Printed, it is two or three lines."""

    into: str
    rows: Sequence[Repacked]

    def lost(self, into: str) -> float | None:
        """|result - wanted| / |wanted - base| over all layers: the share of the change. None where it is unknown."""
        return self._share(into, lambda row: row.change)

    def off(self, into: str) -> float | None:
        """|result - wanted| / |wanted| over all layers. None where it is unknown."""
        return self._share(into, lambda row: row.weight)

    def _share(self, into: str, of: Callable[[Repacked], float]) -> float | None:
        lost = [row.quantised if into == "quantised" else row.dequantised for row in self.rows]
        if any(one is None for one in lost):
            return None
        whole = math.hypot(*map(of, self.rows))
        return math.hypot(*(one or 0.0 for one in lost)) / whole if whole else 0.0

    def told(self, done: str) -> str:
        """As text, where the merge that was done is into the `done` base."""
        lines = [f"Merged into the {done} base: {len(self.rows)} quantised layer{'s' * (len(self.rows) != 1)}."]
        for into in INTO:
            lost, off = self.lost(into), self.off(into)
            share = "" if lost is None or off is None else f"{lost:.1e} of the change, {off:.1e} of the weights"
            lines.append(f"  {'lost so' if into == done else 'would be lost'} ({into}): {share or 'cannot be done'}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.told(self.into)


def repacked(
    module: nn.Module, path: str, given: Mapping[str, Tensor | None], into: str, dtype: torch.dtype
) -> tuple[nn.Module, Repacked | None]:
    """What a quantised layer becomes with another weight, in full precision, or bias; and what is lost.

    A layer of which only the bias changes keeps its weight as it is. The module itself is not touched.

    Raises:
        TypeError: it cannot be quantised anew, and was to be.
    """
    store = packed_store(module)
    assert store is not None
    wanted, bias = given.get("weight"), given.get("bias", getattr(module, "bias", None))
    before = store.read(module).float()
    if wanted is None or torch.equal(wanted, before):
        return _with_bias(form_of(module), given), None
    floats = wanted.to(dtype)
    again = _again(store, module, wanted, needed=into == "quantised")
    row = Repacked(
        path=path,
        weight=float(wanted.norm()),
        change=float((wanted - before).norm()),
        dequantised=float((floats.float() - wanted).norm()),
        quantised=None if again is None else float((store.read(again).float() - wanted).norm()),
    )
    if into == "dequantised" or again is None:
        return float_form(module, floats, bias), row
    return _with_bias(again, given), row


def _again(store: Packed, module: nn.Module, wanted: Tensor, needed: bool) -> Any:
    made = form_of(module)
    try:
        store.write(made, wanted)
    except TypeError:
        if needed:
            raise
        return None
    return made


def _with_bias(made: Any, given: Mapping[str, Tensor | None]) -> Any:
    if "bias" in given:
        bias = given["bias"]
        if isinstance(made, nn.Linear):
            made.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        else:  # of a library that writes it anew itself
            made.__dict__.pop("bias", None)
            made.__dict__["_buffers"]["bias"] = bias
    return made


@torch.no_grad()
def apart(base: nn.Module, original: nn.Module, report: MergeReport) -> tuple[float, float]:
    """How far the weights of `original` are from those of the quantised `base`, at the layers of a report.

    Returns:
        |original - base| / |wanted - base|, and / |wanted|, over all of these layers.
    """
    off = []
    for row in report.rows:
        module, other = base.get_submodule(row.path), original.get_submodule(row.path)
        off.append(float((store_of(other).read(other).float() - store_of(module).read(module).float()).norm()))
    changes, weights = math.hypot(*(r.change for r in report.rows)), math.hypot(*(r.weight for r in report.rows))
    return (math.hypot(*off) / changes if changes else 0.0), (math.hypot(*off) / weights if weights else 0.0)


def float_dtype(base: nn.Module) -> torch.dtype:
    """What a base that is quantised in part computes in: the dtype of its first floats, as a rule the embeddings'."""
    plain = (p for m in base.modules() if packed_store(m) is None for p in m.parameters(recurse=False))
    return next((p.dtype for p in plain if p.is_floating_point()), torch.float32)


@torch.no_grad()
def dequantise(base: Any) -> None:
    """Makes every quantised layer one of floats; the model and its configuration forget that there were some."""
    dtype = float_dtype(base)
    for _, module, store in list(quantised(base)):
        take_form(module, float_form(module, store.read(module).to(dtype), getattr(module, "bias", None)))
    for owner, names in (
        (getattr(base, "config", None), ("quantization_config", "_pre_quantization_dtype")),
        (base, ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")),
    ):
        for name in names:
            if owner is not None and name in vars(owner):
                delattr(owner, name)
