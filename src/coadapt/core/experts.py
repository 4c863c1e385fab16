"""A method at each expert of a fused mixture, (O, I), as one map of the parameter that holds them all, (E, O, I)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .method import Progress


class Experts(nn.Module):
    """W'[e] = each[e].merge(W[e]); where all are alike, as one call for all of them."""

    widens = False

    def __init__(self, each: Sequence[Any]) -> None:
        super().__init__()
        self.each = tuple(each)  # they are the adapter's
        self.alike = each[0].batches and all(_alike(each[0], other) for other in each[1:])

    def merge(self, weight: Tensor) -> Tensor:
        """(E, O, I) -> (E, O, I)"""
        if not self.alike:
            return torch.stack([method.merge(w) for method, w in zip(self.each, weight, strict=True)])
        states = [_state(method) for method in self.each]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        return vmap(self._one, randomness="different")(stacked, weight)

    def _one(self, state: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        return functional_call(_Merge(self.each[0]), dict(state), (weight,))


class _Merge(nn.Module):
    """A method, called by its `merge`."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def forward(self, weight: Tensor) -> Tensor:
        return self.method.merge(weight)


def _state(method: nn.Module) -> dict[str, Tensor]:
    """What a method multiplies by, by the names that it has in a _Merge."""
    found: dict[str, Tensor] = {}
    for path, module in method.named_modules(prefix="method"):
        if not isinstance(module, Progress):
            found |= {f"{path}.{name}": p for name, p in module.named_parameters(recurse=False)}
            found |= {f"{path}.{name}": b for name, b in module.named_buffers(recurse=False)}
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
