"""Methods that are active from certain tokens on: where those stand is found when a stack is called with its tokens."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .frame import Frame, SiteCall, current
from .pooling import Seen

_active_before: "weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Tensor]]" = weakref.WeakKeyDictionary()
"""Cache -> tokens -> (B,) whether they have been among those whose keys and values it holds."""


class InvocationCall:
    """What a plan has at a stack: notes in the frame which of its tokens come from each invocation on.

    A call with a cache goes on with what was active when that cache was last added to.
    """

    def __init__(self, stack: Any, invocations: Sequence[tuple[int, ...]], inner: SiteCall | None) -> None:
        self.invocations, self.inner = tuple(invocations), inner
        self.names = [n for n in inspect.signature(stack.forward).parameters if n not in ("self", "args", "kwargs")]

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, cache = call.get("input_ids"), call.get("past_key_values")
        if not isinstance(ids, Tensor):
            raise ValueError(
                "An adapter that is active from an invocation on (alora_invocation_tokens) looks for it in input_ids, "
                "and this call has none. Pass input_ids."
            )
        past = int(cache.get_seq_length()) if cache is not None else 0
        before = _active_before.get(cache, {}) if past else {}
        told = ids if frame.asked is None else ids[:, : max(frame.asked - past, 0)]  # generated ones do not count
        now: dict[tuple[int, ...], Tensor] = {}
        for tokens in self.invocations:
            start = last(told, tokens)
            goes_on = before[tokens].to(ids.device) if tokens in before else torch.zeros_like(start, dtype=torch.bool)
            found, at = start >= 0, torch.arange(ids.shape[1], device=ids.device)
            active = torch.where(found[:, None], at >= start[:, None], goes_on[:, None])  # (B, T)
            frame.invoked[tokens] = Seen(len(ids), ids.shape[1], past, mask=active.float())
            now[tokens] = found | goes_on
        out = forward(*args, **kwargs) if self.inner is None else self.inner(frame, forward, args, kwargs)
        made = out.get("past_key_values") if isinstance(out, dict) else cache
        if made is not None:
            _active_before[made] = now
        return out


def last(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """(B,) where the last occurrence of `tokens` begins in each row of ids, (B, T); -1 where there is none."""
    if ids.shape[1] < len(tokens):
        return ids.new_full((len(ids),), -1)
    same = (ids.unfold(1, len(tokens), 1) == torch.tensor(tokens, device=ids.device)).all(-1)
    return torch.where(same, torch.arange(same.shape[1], device=ids.device), -1).amax(1)


def active(tokens: tuple[int, ...], rows: int, length: int, device: torch.device) -> Tensor:
    """(B, T) 1 for each token of the running call that comes from the invocation on, 0 for those before."""
    frame = current()
    noted = None if frame is None else frame.invoked.get(tokens)
    found = None if noted is None else noted.real(rows, length, device)
    if found is None:
        raise RuntimeError(
            "An adapter that is active from an invocation on stands where other tokens pass than those of the call. "
            "Leave that layer out of target_modules."
        )
    return found
