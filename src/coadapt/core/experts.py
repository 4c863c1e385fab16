"""A method at each expert of a fused mixture, (O, I), as one map of the parameter that holds them all, (E, O, I)."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from .lowrank import LowRankMethod
from .method import Progress

_ALIKE: MutableMapping[nn.Module, tuple[tuple[int, ...], bool]] = WeakKeyDictionary()
"""The method at a first expert -> which ones stood at all of them, and whether they are alike; to be found out once."""


class Experts(nn.Module):
    """W'[e] = each[e].merge(W[e]); where all are alike, as one call for all of them."""

    widens = False

    def __init__(self, each: Sequence[Any]) -> None:
        super().__init__()
        self.each = tuple(each)  # they are the adapter's
        ids = tuple(map(id, each))
        if (known := _ALIKE.get(each[0])) is None or known[0] != ids:
            known = _ALIKE[each[0]] = ids, all(_alike(each[0], other) for other in each[1:])
        self.alike = known[1]

    def merge(self, weight: Tensor) -> Tensor:
        """(E, O, I) -> (E, O, I)"""
        if not self.alike or torch.compiler.is_compiling():  # which cannot look into copies of modules
            return torch.stack([method.merge(w) for method, w in zip(self.each, weight, strict=True)])
        states = [_state(method) for method in self.each]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        return vmap(self._one, randomness="different")(stacked, weight)

    def _one(self, state: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        return _holding(self.each[0], state).merge(weight)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """As LoRA's at experts, A (E, R, I), B (E, O, R) and a scale; None where they have none."""
        if not all(isinstance(method, LowRankMethod) for method in self.each):
            return None
        each = [method.factors() for method in self.each]
        most = max(len(a) for a, _, _ in each)
        a = torch.stack([F.pad(a, (0, 0, 0, most - len(a))) for a, _, _ in each])
        return a, torch.stack([F.pad(b * s, (0, most - b.shape[1])) for _, b, s in each]), 1.0


def _holding(module: Any, state: Mapping[str, Tensor], path: str = "") -> Any:
    """A copy of `module` with these tensors. Not the module itself, with others for a while: threads share that."""
    made = object.__new__(type(module))
    vars(made).update(vars(module))
    vars(made)["_parameters"] = {name: state.get(f"{path}{name}", p) for name, p in module._parameters.items()}
    vars(made)["_buffers"] = {name: state.get(f"{path}{name}", b) for name, b in module._buffers.items()}
    inner = {n: m if m is None else _holding(m, state, f"{path}{n}.") for n, m in module._modules.items()}
    vars(made)["_modules"] = inner
    return made


def _state(method: nn.Module) -> dict[str, Tensor]:
    """What a method multiplies by."""
    found: dict[str, Tensor] = {}
    for path, module in method.named_modules():
        if not isinstance(module, Progress):
            inside = f"{path}." if path else ""
            found |= {f"{inside}{name}": p for name, p in module.named_parameters(recurse=False)}
            found |= {f"{inside}{name}": b for name, b in module.named_buffers(recurse=False)}
    return found


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two methods differ in nothing but the values of their parameters and buffers."""
    mine, theirs = dict(one.named_modules()), dict(other.named_modules())
    states = [{name: (t.shape, t.dtype) for name, t in _state(method).items()} for method in (one, other)]
    return (
        states[0] == states[1]
        and mine.keys() == theirs.keys()
        and all(map(_same_facts, mine.values(), theirs.values()))
    )


def _same_facts(one: nn.Module, other: nn.Module) -> bool:
    own, others = ({k: v for k, v in vars(m).items() if k not in _OF_EVERY_MODULE} for m in (one, other))
    return type(one) is type(other) and own.keys() == others.keys() and all(_same(own[k], others[k]) for k in own)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    match one:
        case Tensor():
            return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
        case tuple() | list():
            return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
        case int() | float() | str() | Mapping():
            return type(one) is type(other) and one == other
        case _:
            return False
