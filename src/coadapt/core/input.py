"""The embedded input as a site: virtual tokens in front of it, and everything that has to move along with them.

Masks, positions, packing, token types, caches, the length of the output, and what a decoder sees of its encoder.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import Backbone, counts_alone, counts_by_mask
from .composition import Node, Seq
from .frame import Frame, SiteCall
from .gates import Gate, Reading, gated, input_site, is_zero, per_row
from .method import InputMethod
from .pooling import placed


@dataclass(frozen=True)
class Virtual:
    """The virtual tokens of one call: embeddings (B, N, D), which of them are real (B, N), and whether all are."""

    embeds: Tensor
    real: Tensor
    full: bool

    @property
    def count(self) -> int:
        return self.embeds.shape[1]


def embedded_input(place: Backbone) -> str:
    """Where a frame keeps what the embedding of a stack is to give."""
    return f"{place.path}'s embedded input"


class EmbeddingCall:
    """What a plan has at an input embedding: gives what an InputCall has put together, in place of looking ids up.

    Not every model treats `inputs_embeds` as it treats ids (Pegasus scales only what it has looked up itself).
    """

    def __init__(self, embedded: str, inner: SiteCall | None) -> None:
        self.embedded, self.inner = embedded, inner

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ready = frame.inputs.pop(self.embedded, None)
        if ready is not None:
            return ready
        return forward(*args, **kwargs) if self.inner is None else self.inner(frame, forward, args, kwargs)


class InputCall:
    """What a plan has at a backbone: prompts, and the shift of positions that prefixes ask for."""

    def __init__(
        self,
        place: Backbone,
        nodes: Sequence[Node],
        methods: Mapping[str, InputMethod],
        offsets: Sequence[int],
        encoder: "InputCall | None",
        inner: SiteCall | None = None,
    ) -> None:
        self.place, self.nodes, self.methods = place, tuple(nodes), methods
        self.offsets = tuple(offsets)
        self.encoder = encoder
        """The call at the encoder whose states this decoder reads, where that one has virtual tokens."""
        self.names = [
            n for n in inspect.signature(place.module.forward).parameters if n not in ("self", "args", "kwargs")
        ]
        self.cuts = place.role == "decoder" or not _feeds_a_decoder(place.module)
        self.embedded, self.inner = embedded_input(place), inner
        self.trailing = place.role == "encoder" and "position_ids" not in self.names
        """Whether rows with fewer virtual tokens are filled up behind their input: positions cannot be told."""
        keeping = [name for name, m in methods.items() if m.keeps_virtual_tokens]
        if keeping and len(keeping) < len(methods):
            others = ", ".join(repr(n) for n in methods if n not in keeping)
            raise ValueError(
                f"{keeping[0]!r} returns the states of its virtual tokens (output_virtual_tokens=True) and {others} "
                "does not; in one call all of them do, or none."
            )
        self.keeps = bool(keeping)

    # ---- the virtual tokens ------------------------------------------------------------------------------------------

    def virtual(self, frame: Frame, like: Tensor, at: Reading | None = None) -> Virtual | None:
        """The prompts for a call with embeddings like `like`, (B, T, D); shorter ones are padded on the left.

        Args:
            at: what routers read; None where only the lengths matter.
        """
        found = [self._tokens(node, at, len(like)) for node in self.nodes]
        count = [0 if t is None else t.shape[-2] for t in found]
        longest = max(count)
        if not longest:
            return None
        padded: list[Tensor] = []
        for tokens in found:
            tokens = like.new_zeros(0, like.shape[2]) if tokens is None else tokens.to(like)
            padded.append(F.pad(tokens, (0, 0, longest - tokens.shape[-2], 0)))
        lengths = torch.tensor(count, device=like.device)
        rows = self._rows(frame, like)
        real = torch.arange(longest, device=like.device) >= longest - lengths[rows, None]
        return Virtual(_of_rows(padded, rows), real, all(c == longest for c in count))

    def _tokens(self, node: Node, at: Reading | None, rows: int) -> Tensor | None:
        """(N, D) or (rows, N, D): in a Seq one after the other, in a Sum added. None where `node` has no prompt."""
        if isinstance(node, str):
            own = self.methods[node].prompt() if node in self.methods else None
            return own if own is None or own.dim() == 2 else per_row(own, rows)
        weights = getattr(node, "weights", (1.0,) * len(node.children))
        pairs = [(self._tokens(c, at, rows), w) for c, w in zip(node.children, weights, strict=True) if not is_zero(w)]
        found = [(t, w) for t, w in pairs if t is not None]
        if not found:
            return None
        if isinstance(node, Seq):
            return _joined([t for t, _ in found])
        lengths = sorted({t.shape[-2] for t, _ in found})
        if len(lengths) > 1:
            raise ValueError(
                f"A Sum adds prompts token by token; these have {lengths} tokens. Put them in a Seq to join them."
            )
        if any(isinstance(w, Tensor) for _, w in found):
            raise ValueError("A prompt cannot have a gate per row or token; say with adapter_names which rows use it.")
        total = found[0][0] * 0
        for tokens, weight in found:
            if at is None:
                total = total + tokens
                continue
            gate = Gate().times(weight).value(at)
            each = isinstance(gate, Tensor) and gate.dim() == 1
            total = total + gated(gate, tokens.expand(len(at.y), *tokens.shape[-2:]) if each else tokens)
        return total

    def _rows(self, frame: Frame, like: Tensor) -> Tensor:
        if frame.rows is None:
            return torch.zeros(len(like), dtype=torch.long, device=like.device)
        return per_row(frame.rows.to(like.device), len(like))

    def shift(self, frame: Frame, like: Tensor) -> Tensor | None:
        """(B, 1) by how much prefixes move the positions, or None."""
        if not any(self.offsets):
            return None
        return torch.tensor(self.offsets, device=like.device)[self._rows(frame, like)][:, None]

    # ---- the call ----------------------------------------------------------------------------------------------------

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.encoder is not None:
            self._widen_encoder_mask(frame, call)
        ids = call.pop("input_ids", None)
        if ids is not None:
            call["inputs_embeds"] = self.place.embedding(ids)
        embeds: Tensor = call["inputs_embeds"]
        past = _cached(call.get("past_key_values"))
        at = None if past else Reading(input_site(self.place.path), embeds, embeds)
        virtual, shift = self.virtual(frame, embeds, at), self.shift(frame, embeds)
        keeps = self.keeps or frame.whole
        if virtual is not None and keeps and not virtual.full:
            raise ValueError(
                "The rows of a batch need prompts of one length where the states of virtual tokens are returned "
                "(output_virtual_tokens=True, or a loss that reads them): the output has one length for all."
            )
        if virtual is not None and not past and (starts := _restarts(call)) is not None:
            keep = _pack(call, virtual, starts)
            call["position_ids"] = call["position_ids"] + (0 if shift is None else shift)
        else:
            keep = self._insert(call, virtual, shift, past)
        frame.kept = keep
        placed(frame, self.place.path, keep, call["inputs_embeds"].shape[1])
        if ids is not None:
            frame.inputs[self.embedded] = embeds = call.pop("inputs_embeds")
            call["input_ids"] = ids if keep is None else self._stand_ins(ids, keep, embeds.shape[1])
        out = forward(**call) if self.inner is None else self.inner(frame, forward, (), call)
        if frame.inputs.pop(self.embedded, None) is not None:
            raise RuntimeError(
                f"{type(self.place.module).__name__} does not call its input embedding; pass inputs_embeds."
            )
        return out if keep is None or keeps or not self.cuts else _cut(out, keep, self.place.module)

    def _stand_ins(self, ids: Tensor, keep: Tensor, length: int) -> Tensor:
        """(B, N + T) ids whose embeddings will not be looked up: models read more from ids than those."""
        padding = getattr(self.place.module.config, "pad_token_id", None)
        return ids.new_full((len(ids), length), 1 if padding == 0 else 0).scatter(1, keep, ids)

    def _insert(self, call: dict[str, Any], virtual: Virtual | None, shift: Tensor | None, past: int) -> Tensor | None:
        """Puts the virtual tokens in, unless the cache holds them. Returns where the real ones are, (B, T)."""
        embeds, mask, length = call["inputs_embeds"], call.get("attention_mask"), call["inputs_embeds"].shape[1]
        positions = self._real_positions(call, virtual, shift, past)  # before the virtual tokens move them
        if virtual is None:
            call["position_ids"] = positions if shift is None or positions is None else positions + shift
            return None
        if not virtual.full and not self.trailing and counts_alone(self.place.module):
            raise ValueError(
                f"The rows of a batch need prompts of one length in front of {self.place.path!r}: "
                f"{type(self.place.module).__name__} counts positions itself, so shorter ones would be out of place."
            )
        wide = _widened(virtual, mask, past + length - (virtual.count if past else 0), self.trailing)
        order: Tensor | None = None
        if wide is not None:
            call["attention_mask"], order = wide
        if positions is not None:
            call["position_ids"] = _moved(positions, virtual, mask, shift, past, order)
        if past:
            return None
        call["inputs_embeds"] = _ordered(torch.cat([virtual.embeds, embeds], dim=1), order)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = F.pad(call["token_type_ids"], (virtual.count, 0))
        at = torch.arange(virtual.count + length, device=embeds.device).expand(len(embeds), -1)
        return (at if order is None else order.argsort(dim=1))[:, virtual.count :]

    def _real_positions(
        self, call: dict[str, Any], virtual: Virtual | None, shift: Tensor | None, past: int
    ) -> Tensor | None:
        """(B or 1, T) the positions that the tokens have without us; None where the model can go on counting itself."""
        given = call.get("position_ids")
        if "position_ids" not in self.names or (given is None and shift is None and (virtual is None or virtual.full)):
            return None
        if given is not None:
            return given
        before = past - (virtual.count if virtual is not None and past else 0)
        length, first = call["inputs_embeds"].shape[1], _first_position(self.place.module)
        if (mask := call.get("attention_mask")) is not None and counts_by_mask(self.place.module):
            return (mask.long().cumsum(1) * mask - 1)[:, -length:]
        return torch.arange(before, before + length, device=call["inputs_embeds"].device)[None] + first

    def _widen_encoder_mask(self, frame: Frame, call: dict[str, Any]) -> None:
        """The mask over an encoder's states, where those hold virtual tokens and it does not."""
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        assert self.encoder is not None
        if states is None or (virtual := self.encoder.virtual(frame, states)) is None:
            return
        real = states.shape[1] - virtual.count
        if mask is not None and mask.shape[1] != real:
            return
        if (wide := _widened(virtual, mask, real, self.encoder.trailing)) is not None:
            call["encoder_attention_mask"] = wide[0]


def _of_rows(tokens: Sequence[Tensor], rows: Tensor) -> Tensor:
    """(B, N, D): to each row its own of `tokens`, (N, D) each, or (B, N, D) where rows differ already."""
    if len(tokens) == 1:
        return tokens[0].expand(len(rows), *tokens[0].shape[-2:])
    if all(t.dim() == 2 for t in tokens):
        return torch.stack(list(tokens)).index_select(0, rows)
    each = torch.stack([t.expand(len(rows), *t.shape[-2:]) for t in tokens])
    return each[rows, torch.arange(len(rows), device=each.device)]


def _joined(tokens: Sequence[Tensor]) -> Tensor:
    """One after the other, (N, D), or (B, N, D) where one of them is."""
    rows = max((len(t) for t in tokens if t.dim() == 3), default=0)
    return torch.cat([t.expand(rows, *t.shape[-2:]) if rows else t for t in tokens], dim=-2)


def _widened(virtual: Virtual, mask: Any, length: int, trailing: bool = False) -> tuple[Tensor, Tensor] | None:
    """The mask with the virtual tokens, (B, N + S), and the order in which [virtual; real] tokens stand, (B, N + S).

    Virtual tokens stand right before the first real one: behind padding on the left, so that no model sees a gap.
    Slots that a row has no virtual token for are padding too: on the left, or on the right if `trailing`.
    None where nothing is masked.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            "Virtual tokens need an attention mask of shape (batch, tokens); this call has "
            f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}. Static caches make such "
            "masks: use the dynamic cache with prompts."
        )
    if mask is None and virtual.full:
        return None
    seen = virtual.real.new_ones(len(virtual.real), length) if mask is None else mask
    both = torch.cat([virtual.real.to(seen.dtype), seen], dim=1)
    free = (~virtual.real).to(torch.int8) * (1 if trailing else -1)
    before = -(seen.cumsum(1) == 0).to(torch.int8)
    order = torch.cat([free, before], dim=1).argsort(dim=1, stable=True)
    return both.gather(1, order), order


def _moved(
    positions: Tensor, virtual: Virtual, mask: Tensor | None, shift: Tensor | None, past: int, order: Tensor | None
) -> Tensor:
    """Positions with the virtual tokens in front of the first real one, whose place the first of them takes."""
    count = virtual.real.sum(1, keepdim=True)  # (B, 1)
    real = positions.expand(len(count), -1) + count
    if not past:
        first = positions.expand(len(count), -1)
        if mask is not None:
            first = first.gather(1, mask.to(torch.uint8).argmax(dim=1, keepdim=True))
        own = first[:, :1] + (virtual.real.long().cumsum(1) - 1).clamp(min=0)
        real = _ordered(torch.cat([own, real], dim=1), order)
    return real if shift is None else real + shift


def _ordered(tokens: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return tokens
    return picked(tokens, order) if tokens.dim() == 3 else tokens.gather(1, order)


def picked(tokens: Tensor, at: Tensor) -> Tensor:
    """(B, T, D) -> (B, K, D), those at (B, K); gather would save all of them for its backward."""
    batch, length, width = tokens.shape
    rows = torch.arange(batch, device=at.device)[:, None] * length
    return tokens.reshape(-1, width).index_select(0, (rows + at).flatten()).view(batch, -1, width)


def _feeds_a_decoder(module: Any) -> bool:
    return bool(getattr(module.config, "is_encoder_decoder", False)) or "T5" in type(module).__name__


def _first_position(module: Any) -> int:
    """RoBERTa and its kin count positions from the padding index on."""
    padding = getattr(getattr(module, "embeddings", None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def _cached(cache: Any) -> int:
    """How many positions a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def _restarts(call: dict[str, Any]) -> Tensor | None:
    """(B, T) which tokens begin a packed sequence, or None where every row is one sequence."""
    if call.get("position_ids") is None or call.get("attention_mask") is not None:
        return None
    starts = call["position_ids"] == 0
    starts[..., 0] = True
    return starts if bool(starts[..., 1:].any()) else None


def _pack(call: dict[str, Any], virtual: Virtual, starts: Tensor) -> Tensor:
    """Each packed sequence gets virtual tokens, so that it equals itself alone. Returns where the real ones are."""
    if not virtual.full:
        raise ValueError("Packed rows need virtual tokens of one length; these rows use prompts of unequal lengths.")
    embeds, positions, n = call["inputs_embeds"], call["position_ids"], virtual.count
    batch, length, width = embeds.shape
    starts, positions = starts.expand(batch, -1), positions.expand(batch, -1)
    number = starts.long().cumsum(1)  # (B, T): which sequence of its row a token lies in, from 1
    at = torch.arange(length, device=embeds.device) + number * n
    total = length + int(number.max()) * n
    out = embeds.new_zeros(batch, total, width).scatter(1, at[..., None].expand(-1, -1, width), embeds)
    where = torch.zeros(batch, total, dtype=positions.dtype, device=embeds.device).scatter(1, at, positions + n)
    rows, columns = starts.nonzero(as_tuple=True)
    for j in range(n):
        slots = at[rows, columns] - n + j
        out = out.index_put((rows, slots), virtual.embeds[rows, j])
        where = where.index_put((rows, slots), torch.full_like(slots, j))
    call.update(inputs_embeds=out, position_ids=where, use_cache=False)
    if call.get("token_type_ids") is not None:
        raise ValueError("Packed rows with virtual tokens cannot have token_type_ids.")
    return at


def _cut(out: Any, keep: Tensor, module: Any) -> Any:
    """The output without the virtual tokens' states: as long as the input."""
    if isinstance(out, tuple):
        return (picked(out[0], keep), *out[1:])
    if isinstance(out, Tensor):
        return picked(out, keep)
    out["last_hidden_state"] = picked(out["last_hidden_state"], keep)
    if out.get("hidden_states") is not None:
        out["hidden_states"] = tuple(picked(states, keep) for states in out["hidden_states"])
    if out.get("pooler_output") is not None:
        out["pooler_output"] = module.pooler(out["last_hidden_state"])
    return out
