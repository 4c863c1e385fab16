"""Attention calls as sites: prefixes are joined to k and v inside of the call, through transformers' interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import Frame, SiteCall, current
from .gates import Gates, Reading, attention_site, gated
from .method import AttentionMethod
from .roles import Attention, attentions, without_interface
from .site import shadow

NAME = "coadapt"
"""Of our attention function in transformers' registry."""
_CAN_JOIN = ("eager", "sdpa")
_LONG = 16
"""From so many queries for each virtual token on, queries of no meaning in front of the others, which make the call an
ordinary causal one, cost less than a mask, which keeps kernels from leaving out what it hides (measured: 4 x 8 heads of
64, 20 virtual tokens, one CPU core: at 128 queries 1.25 x the time, at 512 0.8 to 1.0 x, at 1024 0.7 x)."""


@dataclass(frozen=True)
class AttentionTerm:
    """One prefix at an attention call, with its gates."""

    method: AttentionMethod
    gates: Gates

    def weight(self, rows: Tensor | None, at: Reading) -> Tensor:
        """(1,), (B,) or (B, T): 0 where it takes no part."""
        value = self.gates.value(rows, at) if rows is not None or self.gates.each[0] is not None else 0.0
        found = torch.as_tensor(value, device=at.y.device).to(torch.promote_types(at.y.dtype, torch.float32))
        return found.reshape(1) if found.dim() == 0 else found


class AttentionCall:
    """What a plan has at an attention module: every prefix that some row uses."""

    def __init__(self, module: Any, path: str, terms: Sequence[AttentionTerm]) -> None:
        self.terms, self.site = tuple(terms), attention_site(path)
        self.reads = any(t.gates.reads for t in terms)
        """Whether the module's input is noted in the frame, for gates that need it."""
        self.later = f"{path}'s output" if any(t.method.behind for t in terms) else ""
        """What the frame calls what is to be added to the module's output, if anything is."""
        own = module.__dict__["config"]
        self.kind: str = own._attn_implementation or "eager"
        self.config = shadow(own, NAME)

    def __call__(
        self,
        attend: Callable[..., Any],
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        **kw: Any,
    ) -> Any:
        """Returns the attention's output, (B, T, H, D), and its weights.

        Args:
            q: (B, H, T, D). k and v: (B, H, S, D), H of the keys. mask: None, bool or added, (B, 1 or H, T, S).
        """
        frame = current()
        assert frame is not None
        at = Reading(self.site, frame.inputs.pop(self.site) if self.reads else q, q)
        joint = [t for t in self.terms if t.method.joint]
        apart = [t for t in self.terms if not t.method.joint]
        out, weights = self.joined(joint, at, frame.rows, attend, module, q, k, v, mask, kw)
        free = (
            {**kw, "is_causal": False, "position_bias": None} if "position_bias" in kw else {**kw, "is_causal": False}
        )
        for term in apart:
            keys, values = (p.to(q).expand(len(q), -1, -1, -1) for p in term.method.prefix())
            seen = attend(module, q, keys, values, None, **free)[0]
            strength = term.method.strength()
            gate = term.weight(frame.rows, at)
            change = gated(gate if strength is None else gate * strength, seen)
            if term.method.behind:
                frame.inputs[self.later] = frame.inputs.get(self.later, 0) + change.flatten(2)
            else:
                out = out + change
        return out, weights

    def joined(
        self, terms: Sequence[AttentionTerm], at: Reading, rows: Tensor | None, attend: Callable[..., Any],
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, kw: dict[str, Any],
    ) -> Any:  # fmt: skip
        if not terms:
            return attend(module, q, k, v, mask, **kw)
        causal = kw.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        pairs = [t.method.prefix() for t in terms]
        keys, values = (torch.cat([pair[i].to(q) for pair in pairs], dim=1).expand(len(q), -1, -1, -1) for i in (0, 1))
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        lengths = [pair[0].shape[1] for pair in pairs]
        n = sum(lengths)
        if mask is None and causal and q.shape[2] > 1:  # the cache was empty; a static one has room behind its keys
            bias = kw.get("position_bias")
            if self.kind == "sdpa" and q.shape[2] >= _LONG * n and bias is None and all(t.gates.is_one for t in terms):
                out, weights = attend(module, F.pad(q, (0, 0, n, 0)), keys, values, None, **{**kw, "is_causal": True})
                return out[:, n:], weights
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
            mask = mask if self.kind == "sdpa" else _as_added(mask, q)
        mask = self._widened(terms, lengths, rows, at, q, k, mask)
        if kw.get("position_bias") is not None:
            kw = {**kw, "position_bias": _biased(kw["position_bias"], terms, lengths)}
        return attend(module, q, keys, values, mask, **{**kw, "is_causal": False})

    def _widened(
        self,
        terms: Sequence[AttentionTerm],
        lengths: Sequence[int],
        rows: Tensor | None,
        at: Reading,
        q: Tensor,
        k: Tensor,
        mask: Any,
    ) -> Any:
        """The mask with columns for the prefixes in front; log g on their scores, so that a gate of 0 removes them."""
        n = sum(lengths)
        if all(t.gates.is_one for t in terms):
            if mask is None:
                return None
            return F.pad(mask, (n, 0), value=True) if mask.dtype == torch.bool else F.pad(mask, (n, 0))
        gates = [t.weight(rows, at) for t in terms]
        if any(bool((g < 0).any()) for g in gates if not torch.compiler.is_compiling()):
            raise ValueError(
                "A joint prefix cannot have a gate below 0: its gate is a bias log g. Use a decoupled prefix."
            )
        columns = [_log(g, q.dtype)[..., None].expand(-1, -1, m) for g, m in zip(gates, lengths, strict=True)]
        if mask is None:
            mask = q.new_zeros(1, 1, 1, k.shape[2])
        mask = _as_added(mask, q)
        count = max(len(mask), *(len(c) for c in columns))
        height = max(mask.shape[2], 1, *(c.shape[1] for c in columns))
        bias = torch.cat([c.expand(count, height, -1) for c in columns], dim=2).to(q.dtype)[:, None]  # (B, 1, T, N)
        heads = mask.shape[1]
        out = torch.cat([bias.expand(-1, heads, -1, -1), mask.expand(count, heads, height, -1)], dim=3)
        return out.expand(len(q), -1, q.shape[2], -1) if self.kind == "sdpa" else out


class BehindCall:
    """What a plan has at an attention module to whose output something is added that an AttentionCall has made."""

    def __init__(self, later: str, inner: SiteCall | None) -> None:
        self.later, self.inner = later, inner

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = forward(*args, **kwargs) if self.inner is None else self.inner(frame, forward, args, kwargs)
        change = frame.inputs.pop(self.later)
        return (out[0] + change, *out[1:]) if isinstance(out, tuple) else out + change


def _log(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """log g of (B,) or (B, T) as (B, 1 or T); the lowest number, without a gradient, where g is 0."""
    gate = gate[:, None] if gate.dim() == 1 else gate
    lowest = torch.finfo(dtype).min
    return torch.where(gate > 0, gate, 1.0).log().clamp(min=lowest).masked_fill(gate <= 0, lowest)


def _biased(bias: Tensor, terms: Sequence[AttentionTerm], lengths: Sequence[int]) -> Tensor:
    """The position bias (1, H, T, S) with columns for the prefixes in front."""
    queries, keys = bias.shape[2:]
    columns: list[Tensor] = []
    for term, n in zip(terms, lengths, strict=True):
        own = term.method.position_bias(queries, keys)
        columns.append(
            bias.new_zeros(*bias.shape[:3], n) if own is None else own.to(bias.dtype).expand(len(bias), -1, -1, -1)
        )
    return torch.cat([*columns, bias], dim=3)


def _as_added(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
    """What transformers calls at a module whose configuration is a shadow."""
    frame = current()
    call = None if frame is None else frame.attention.get(module)
    assert call is not None
    return call(_own_function(module, call.kind), module, q, k, v, mask, **kwargs)


def _own_function(module: Any, kind: str) -> Callable[..., Any]:
    """The attention that the module would call by itself."""
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager)


def joinable(who: str, base: Any) -> list[Attention]:
    """The attention calls of a model that a prefix can join. Raises ValueError where there are none."""
    found = attentions(base)
    if not found:
        classes = without_interface(base)
        if not classes:
            raise ValueError(f"{who}: {type(base).__name__} has no attention that a prefix could join.")
        raise ValueError(
            f"{who}: {type(base).__name__} does not go through transformers' attention interface (its "
            f"{classes[0]} computes attention itself), so a prefix cannot be joined to it. Prompt tuning, LoRA and "
            "bottleneck adapters work on this model."
        )
    prepare([p.module for p in found])
    return found


def prepare(modules: Sequence[Any]) -> None:
    """Makes our function known to transformers. Raises ValueError where a model's attention cannot take a prefix."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    for module in modules:
        kind = module.config._attn_implementation or "eager"
        if kind not in _CAN_JOIN:
            raise ValueError(
                f"A prefix cannot be joined to the attention {kind!r} of this model, which takes no mask of its own. "
                f"Load the model with attn_implementation='sdpa'."
            )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
