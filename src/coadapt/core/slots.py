"""One graph for all compositions of what has factors: each adapter is copied into a slot; a call says how much of each.

A compiled call without a backward runs the same operations on tensors of the same shapes, whatever is active: switches,
weights, other adapters for each row, and adapters that come and go change what is in the tensors only.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapter import Adapter, Part
from .composition import Node, terms
from .frame import Frame
from .gates import per_row
from .layer import Layer
from .lowrank import LowRankMethod, is_fused
from .site import first_input
from .store import stamp


class SlotCall:
    """y + sum_s g_s B_s (A_s x) over all slots s, at one layer."""

    @torch.inference_mode(False)  # tensors that were made in it could not be written to outside of it
    def __init__(self, layer: Layer, slots: int, rank: int) -> None:
        out_features, in_features = layer.shape
        weight = layer.like()
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.rank = rank
        self.down = torch.zeros(slots, rank, in_features, **like)  # (S, R, I)
        self.up = torch.zeros(slots, rank, out_features, **like)  # (S, R, O), times the scale

    @torch.inference_mode(False)
    @torch.no_grad()
    def put(self, slot: int, method: LowRankMethod | None) -> None:
        """Fills a slot; with None it changes nothing."""
        self.down[slot].zero_()
        self.up[slot].zero_()
        if method is not None:
            a, b, scale = method.factors()
            self.down, self.up = self.down.to(a.device), self.up.to(a.device)  # the model may have been moved
            self.down[slot, : len(a)] = a
            self.up[slot, : len(a)] = b.mT * scale

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, call = first_input(forward, args, kwargs)
        y = call(x)
        gates = per_row(frame.mixture, len(x)).to(y).repeat_interleave(self.rank, 1)  # (B, S R)
        z = F.linear(x.to(y.dtype), self.down.flatten(0, 1).to(y.dtype))
        return y + (z * gates.view(len(gates), *[1] * (x.dim() - 2), -1)) @ self.up.flatten(0, 1).to(y.dtype)


class Slots:
    """The slots of one view. They grow when more or larger adapters come: then a compiled view compiles again."""

    def __init__(self, count: int = 1, rank: int = 1) -> None:
        self.count, self.rank = count, rank
        self.calls: dict[nn.Module, SlotCall] = {}
        self.layers: dict[nn.Module, str] = {}
        self.places: list[str | None] = [None] * count
        self._states: dict[str, Any] = {}
        self._adapters: dict[str, Adapter] = {}
        """All that were attached the last time."""
        self._fit = True
        """Whether all of them go into slots."""

    def fill(self, adapters: Mapping[str, Adapter], used: Collection[str]) -> bool:
        """Has the slot of each adapter in `used` hold what that is now; the others' are not looked at.

        Returns:
            False where one of all `adapters` has something that goes into no slot, or of those in `used` drops inputs.
        """
        if self._adapters != adapters:
            self._adapters = dict(adapters)
            self._fit = all(fits(part) for adapter in adapters.values() for part in adapter.parts)
            if self._fit:
                self._make_room()
        if not self._fit or any(part.method.drops for name in used for part in adapters[name].parts):  # type: ignore[union-attr]
            return False
        for name in used:
            state = [stamp(p) for p in adapters[name].parameters()]
            if None in state or self._states.get(name) != state:
                slot = self.places.index(name if name in self.places else None)
                self._put(slot, adapters[name])
                self.places[slot], self._states[name] = name, state
        return True

    def reserve(self, layers: Mapping[nn.Module, str], count: int, rank: int) -> None:
        """Makes room beforehand."""
        if count > self.count or rank > self.rank or layers.keys() - self.layers.keys():
            self.count, self.rank = max(count, self.count), max(rank, self.rank)
            self.layers |= layers
            self.calls = {m: SlotCall(Layer(m, path), self.count, self.rank) for m, path in self.layers.items()}
            self.places, self._states = [None] * self.count, {}

    def mixture(self, nodes: Sequence[Node]) -> Tensor | None:
        """(B, S): how much of each slot each of these compositions uses. None where that is not all numbers."""
        out = torch.zeros(len(nodes), self.count)
        for row, node in enumerate(nodes):
            for name, gate in terms(node, lambda _: True):
                if not gate.is_number:
                    return None
                out[row, self.places.index(name)] += gate.number
        return out.to(next((call.down.device for call in self.calls.values()), "cpu"))

    def _make_room(self) -> None:
        """For adapters that came; the slots of those that went are free again."""
        for slot, name in enumerate(self.places):
            if name is not None and name not in self._adapters:
                self._put(slot, None)
                self._states.pop(name)
                self.places[slot] = None
        parts = [part for adapter in self._adapters.values() for part in adapter.parts]
        count = self.count
        while count < len(self._adapters):
            count *= 2
        rank = max((part.method.factors()[1].shape[1] for part in parts), default=1)  # type: ignore[union-attr]
        self.reserve({part.place.module: part.place.path for part in parts}, count, rank)

    def _put(self, slot: int, adapter: Adapter | None) -> None:
        methods = {} if adapter is None else {part.place.module: part.method for part in adapter.parts}
        for module, call in self.calls.items():
            call.put(slot, methods.get(module))  # type: ignore[arg-type]


def fits(part: Part) -> bool:
    """Whether a part of an adapter can go into a slot: two factors at a linear layer."""
    place = part.place
    if place.parameter or place.reads or not is_fused(part.method):
        return False
    return Layer(place.module, place.path).kind.name == "linear" and part.method.factors()[0].dim() == 2
