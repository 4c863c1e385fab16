"""The mean of a row's real tokens, for routers: without padding and virtual tokens, and without a look ahead.

A token of a causal stack sees the mean of itself and the tokens before it, so that a router trained on whole texts
decides alike while it generates, with a cache or without. Elsewhere all real tokens of the row are averaged.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .first_pass import first_pass, keep
from .frame import Frame, SiteCall, current
from .gates import Spot, per_row


@dataclass
class Seen:
    """The tokens of one call of a stack."""

    rows: int
    length: int
    """T, those of this call."""
    past: int
    """How many the cache holds."""
    before: Tensor | int = 0
    """(B,) how many of those are real, as far as a mask tells."""
    mask: Tensor | None = None
    """(B, T) which are real; None: all."""
    keep: Tensor | None = None
    """(B, T) where they stand, once virtual tokens have been put in, which make `length` longer."""
    unclear: Callable[[], str] | None = None
    """Why nothing says which tokens are real or belong together, or "", where that has to be looked at."""

    def check(self) -> None:
        """Raises ValueError where an average over the tokens would be of others than those of the row."""
        if self.unclear is not None and (why := self.unclear()):
            raise ValueError(f"What is active counts the tokens of a row, and {why}, or use what does not.")
        self.unclear = None

    def real(self, rows: int, length: int, device: torch.device) -> Tensor | None:
        """(rows, length) which tokens count, or None where the call's tokens are not so many."""
        if length != self.length:
            return None
        mask = self.mask
        if self.keep is not None:
            ones = torch.ones_like(self.keep) if mask is None else mask.to(self.keep.dtype)
            mask = self.keep.new_zeros(len(self.keep), length).scatter(1, self.keep, ones.expand_as(self.keep))
        return torch.ones(rows, length, device=device) if mask is None else per_row(mask, rows).to(device)


class SeenCall:
    """What a plan has at a stack where there are routers: notes its real tokens in the frame.

    Args:
        pools: whether one averages them, and goes on from what a cache holds; the others count what they used.
        first: whether one reads what the bare model makes of them.
    """

    def __init__(
        self, path: str, stack: Any, encoder: str | None, inner: SiteCall | None, pools: bool, first: bool = False
    ) -> None:
        self.path, self.encoder, self.inner, self.pools = path, encoder, inner, pools
        self.stack, self.first = stack, first
        self.names = [n for n in inspect.signature(stack.forward).parameters if n not in ("self", "args", "kwargs")]

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        bare = None
        if self.first:
            frame.first, bare = first_pass(forward, call, self.stack.training)
        told = next((call[n] for n in ("input_ids", "inputs_embeds") if call.get(n) is not None), None)
        if told is None:  # features of sounds or images, all real; noted, so that a recomputation finds the same
            frame.seen[self.path] = None
        else:
            cache, mask = call.get("past_key_values"), call.get("attention_mask")
            past = int(cache.get_seq_length()) if self.pools and cache is not None else 0
            seen = frame.seen[self.path] = Seen(len(told), told.shape[1], past, past)
            if mask is None:
                seen.unclear = functools.partial(_packed, call.get("position_ids"))
            elif isinstance(mask, Tensor) and mask.dim() == 2:
                seen.mask = mask[:, -told.shape[1] :]
                seen.before = mask[:, : -told.shape[1]].sum(1)
            else:
                seen.unclear = functools.partial(_odd, mask)
        states = call.get("encoder_hidden_states")
        if self.encoder is not None and states is not None and self.encoder not in frame.seen:  # made before this call
            mask = call.get("encoder_attention_mask")
            frame.seen[self.encoder] = Seen(len(states), states.shape[1], 0, mask=mask)
        out = forward(*args, **kwargs) if self.inner is None else self.inner(frame, forward, args, kwargs)
        if bare is not None:
            keep(out.get("past_key_values") if isinstance(out, dict) else call.get("past_key_values"), bare)
        return out


def _packed(positions: Tensor | None) -> str:
    if positions is None or positions.shape[1] == 1:
        return ""
    if torch.compiler.is_compiling():
        return "a compiled call cannot look at position_ids to see whether rows hold several texts: pass attention_mask"
    return (
        "these rows are packed, they hold several texts: pass one a row" if bool((positions[:, 1:] == 0).any()) else ""
    )


def _odd(mask: Any) -> str:
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    return (
        f"this call's attention mask ({found}) does not tell which are real: pass one of (batch, tokens), with the "
        "dynamic cache (a static one makes others)"
    )


def placed(frame: Frame, path: str, keep: Tensor | None, total: int) -> None:
    """Tells where an InputCall has put the real tokens."""
    if keep is None:
        return
    for seen in (frame.seen.get(path), *frame.invoked.values()):
        if seen is not None:
            seen.keep, seen.length = keep, total


def order_in_row(stream: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """How many of its row's real tokens stand before each of x, (B, T, D), and how many behind it; each (B, T).

    Virtual tokens and padding are far from both ends; so are, from the last, the tokens that follow in a cache.

    Raises:
        ValueError: nothing says which tokens are real.
    """
    frame = current()
    seen: Seen | None = None if frame is None else frame.seen.get(stream)
    rows, length = x.shape[:2]
    if seen is None:
        real, past = torch.ones(rows, length, device=x.device), torch.zeros((), device=x.device)
    else:
        seen.check()
        found = seen.real(rows, length, x.device)
        if found is None:
            raise ValueError(f"{length} tokens of {seen.length} in {stream!r}: nothing says which of them these are.")
        real, past = found, seen.before.to(x.device) if isinstance(seen.before, Tensor) else torch.tensor(seen.before)
        past = per_row(past, rows)[:, None] if past.dim() else past.to(x.device)
    count = real.float().cumsum(1)
    none = real <= 0
    far = torch.finfo(torch.float32).max
    started = seen is not None and seen.past > 0
    behind = torch.full_like(count, far) if started else count[:, -1:] - count
    return (count - 1 + past).masked_fill(none, far), behind.masked_fill(none, far)


def pooled(x: Tensor, spot: Spot, key: tuple[int, str]) -> Tensor:
    """The mean of the real tokens: (B, D), or (B, T, D) where the stack is causal, up to each token.

    Args:
        x: (B, T, D), (B * T, D), or (B, D) of what stands behind a pooling layer.
        key: of the running sums, which a cache goes on from.
    """
    frame = current()
    seen: Seen | None = None if frame is None else frame.seen.get(spot.stream)
    if not spot.tokens:
        return x.flatten(2).mean(2) if x.dim() > 2 else x  # (B, C, *K) of a convolution
    if seen is None:
        return x if x.dim() == 2 else x.flatten(1, -2).mean(1)
    seen.check()
    if x.dim() == 2:
        return _flattened(x, spot, key, seen)
    real = seen.real(len(x), x.shape[1], x.device) if x.dim() == 3 else None
    if real is None:
        raise RuntimeError(
            f"A pooled router cannot tell which of the {x.shape[1]} tokens at {spot.path!r} are real: its call has "
            f"{seen.length}. Use a TokenRouter, or leave that site out."
        )
    weights = real.to(x.dtype)[..., None]  # (B, T, 1)
    if not spot.causal:
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1)
    assert frame is not None
    sums, counts = (x * weights).cumsum(1), weights.cumsum(1)
    if seen.past:
        before = frame.sums.get(key)
        if before is None or before[2] != seen.past or len(before[0]) != len(x):
            raise RuntimeError(
                "A pooled router goes on from the mean of the tokens before, which only `generate` of a view keeps, "
                "without beams and without an assistant. Pass whole sequences, or use a TokenRouter."
            )
        sums, counts = sums + before[0], counts + before[1]
    frame.sums[key] = (sums[:, -1:].detach(), counts[:, -1:].detach(), seen.past + x.shape[1])
    return sums / counts.clamp(min=1)


def _flattened(x: Tensor, spot: Spot, key: tuple[int, str], seen: Seen) -> Tensor:
    """(n, D): of whole rows, or of all tokens one after the other."""
    if not spot.causal and len(x) == seen.rows:
        return x
    if len(x) != seen.rows * seen.length:
        raise RuntimeError(
            f"A pooled router cannot tell which rows the {len(x)} tokens at {spot.path!r} belong to (an expert gets "
            "some of all). Use a TokenRouter, or leave that site out."
        )
    mean = pooled(x.view(seen.rows, seen.length, -1), spot, key)
    return mean.flatten(0, 1) if mean.dim() == 3 else mean.repeat_interleave(seen.length, dim=0)


def counted(gates: Tensor, spot: Spot) -> Tensor | None:
    """(B, T) which tokens count where gates (B, T, C) are averaged for a report; None: all."""
    frame = current()
    seen: Seen | None = None if frame is None else frame.seen.get(spot.stream)
    return None if seen is None or gates.dim() != 3 else seen.real(len(gates), gates.shape[1], gates.device)
