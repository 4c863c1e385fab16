"""Which layers have the very same weight; and states of adapters at such layers, which hold each tensor once."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .store import value


def weights(base: nn.Module, modules: Iterable[nn.Module]) -> dict[nn.Module, Any]:
    """The weight of each of `modules`, None where it has none; tied ones are one object, also on the meta device.

    There the objects do not tell: accelerate puts new ones in place after each call, and a model that is built there is
    tied when it is loaded. The model's own word does, unless values that wait elsewhere contradict it.
    """
    found = {m: getattr(m, "weight", None) for m in modules}
    if any(isinstance(weight, nn.Parameter) and weight.is_meta for weight in found.values()):
        for one, other in _said_to_be_tied(base):
            if one in found and _equal(one, other):
                found[one] = found.get(other, other.weight)
    return found


def _said_to_be_tied(base: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Layers, each with the one whose weight it is to have; those of inner models first, as these may be tied again."""
    for part in reversed([m for m in base.modules() if hasattr(m, "get_expanded_tied_weights_keys")]):
        told: dict[str, str] = part.get_expanded_tied_weights_keys()  # type: ignore[operator]
        for name, source in told.items():
            if name.endswith(".weight") and source.endswith(".weight"):
                yield (
                    part.get_submodule(name.removesuffix(".weight")),
                    part.get_submodule(source.removesuffix(".weight")),
                )


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two weights have the same values, or both of them none yet."""
    a, b = value(one, "weight"), value(other, "weight")
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(a.cpu(), b.cpu())


def aliases(holder: nn.Module) -> dict[str, str]:
    """Keys of a state whose tensor has another key before -> that one. Files of tensors refuse to hold one twice."""
    first: dict[int, str] = {}
    every = holder.state_dict(keep_vars=True)
    return {key: first[id(t)] for key, t in every.items() if first.setdefault(id(t), key) != key}


def once(state: dict[str, Any], holder: nn.Module, prefix: str = "") -> dict[str, Any]:
    """`state` of `holder` without what is there by another key."""
    again = {prefix + key for key in aliases(holder)}
    return {key: value for key, value in state.items() if key not in again}


def everywhere(state: Mapping[str, Any], holder: nn.Module) -> dict[str, Any]:
    """Undoes `once`."""
    return {**{key: state[one] for key, one in aliases(holder).items() if one in state}, **state}
