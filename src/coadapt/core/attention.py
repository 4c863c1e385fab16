"""Attention calls as sites: prefixes are joined to k and v inside of the call, through transformers' interface."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .composition import Gate, per_row
from .frame import current
from .method import AttentionMethod
from .site import shadow

NAME = "coadapt"
"""Of our attention function in transformers' registry."""
_CAN_JOIN = ("eager", "sdpa")


@dataclass(frozen=True)
class AttentionTerm:
    """One prefix at an attention call, with its gate in each of the plan's compositions (None: takes no part)."""

    method: AttentionMethod
    gates: tuple[Gate | None, ...]

    def weight(self, rows: Tensor | None, like: Tensor) -> Tensor:
        """(1,) or (B,): 0 where it takes no part."""
        count = len(like)
        values = [torch.zeros(()) if g is None else torch.as_tensor(g.value(count, like)) for g in self.gates]
        dtype = torch.promote_types(like.dtype, torch.float32)
        values = [v.to(device=like.device, dtype=dtype).reshape(-1) for v in values]
        if rows is None:
            return values[0]
        chosen = per_row(rows, count).to(like.device)
        return torch.stack([v.expand(count) for v in values], dim=1).gather(1, chosen[:, None])[:, 0]

    @property
    def is_one(self) -> bool:
        """Whether it takes part with the gate 1 in every row, so that no bias is needed."""
        return all(g is not None and g.number == 1.0 and len(g.factors) == 0 for g in self.gates)


class AttentionCall:
    """What a plan has at an attention module: every prefix that some row uses."""

    def __init__(self, module: Any, terms: Sequence[AttentionTerm]) -> None:
        self.terms = tuple(terms)
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
        joint = [t for t in self.terms if t.method.joint]
        apart = [t for t in self.terms if not t.method.joint]
        out, weights = self.joined(joint, frame.rows, attend, module, q, k, v, mask, kw)
        free = (
            {**kw, "is_causal": False, "position_bias": None} if "position_bias" in kw else {**kw, "is_causal": False}
        )
        for term in apart:
            keys, values = (p.to(q).expand(len(q), -1, -1, -1) for p in term.method.prefix())
            seen = attend(module, q, keys, values, None, **free)[0]
            gate = term.weight(frame.rows, q).view(-1, 1, 1, 1)
            strength = term.method.strength()
            out = out + (gate if strength is None else gate * strength).to(out.dtype) * seen
        return out, weights

    def joined(
        self, terms: Sequence[AttentionTerm], rows: Tensor | None, attend: Callable[..., Any],
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, kw: dict[str, Any],
    ) -> Any:  # fmt: skip
        if not terms:
            return attend(module, q, k, v, mask, **kw)
        causal = kw.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if mask is None and causal and q.shape[2] > 1:  # the cache was empty; a static one has room behind its keys
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
            mask = mask if self.kind == "sdpa" else _as_added(mask, q)
        pairs = [t.method.prefix() for t in terms]
        keys, values = (torch.cat([pair[i].to(q) for pair in pairs], dim=1).expand(len(q), -1, -1, -1) for i in (0, 1))
        lengths = [pair[0].shape[1] for pair in pairs]
        mask = self._widened(terms, lengths, rows, q, k, mask)
        if kw.get("position_bias") is not None:
            kw = {**kw, "position_bias": _biased(kw["position_bias"], terms, lengths)}
        kw = {**kw, "is_causal": False}
        return attend(module, q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), mask, **kw)

    def _widened(
        self,
        terms: Sequence[AttentionTerm],
        lengths: Sequence[int],
        rows: Tensor | None,
        q: Tensor,
        k: Tensor,
        mask: Any,
    ) -> Any:
        """The mask with columns for the prefixes in front; log g on their scores, so that a gate of 0 removes them."""
        n = sum(lengths)
        if all(t.is_one for t in terms):
            if mask is None:
                return None
            return F.pad(mask, (n, 0), value=True) if mask.dtype == torch.bool else F.pad(mask, (n, 0))
        gates = [t.weight(rows, q) for t in terms]
        if any(bool((g < 0).any()) for g in gates if not torch.compiler.is_compiling()):
            raise ValueError(
                "A joint prefix cannot have a gate below 0: its gate is a bias log g. Use a decoupled prefix."
            )
        lowest = torch.finfo(q.dtype).min
        logs = [torch.where(g > 0, g.where(g > 0, 1).log(), lowest) for g in gates]  # the slope of log 0 is no number
        columns = [log[:, None].expand(-1, m) for log, m in zip(logs, lengths, strict=True)]
        count = max(len(c) for c in columns)
        bias = torch.cat([c.expand(count, -1) for c in columns], dim=1).to(q.dtype)[:, None, None]  # (B or 1, 1, 1, N)
        if mask is None:
            mask = q.new_zeros(1, 1, 1, k.shape[2])
        mask = _as_added(mask, q)
        heads, height = mask.shape[1], max(mask.shape[2], 1)
        count = max(count, len(mask))
        left = bias.expand(count, heads, height, n)
        out = torch.cat([left, mask.expand(count, heads, height, -1)], dim=3)
        return out.expand(len(q), -1, q.shape[2], -1) if self.kind == "sdpa" else out


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
