"""Mixtures of experts in a model: where they are, who routes, what their experts are made of."""

import re
from dataclasses import dataclass

from torch import nn

from .layer import LINEAR, kind_of


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, whichever class and order of dims it has."""
    kind = kind_of(module)
    return kind is not None and kind.name == LINEAR.name


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: the module that sends each token to some of them."""

    path: str
    module: nn.Module
    experts: str
    """The path of the module that holds them."""
    router: str
    """The path of the module whose weight, (E, D), scores E experts."""
    raw: tuple[str, ...]
    """Names of their parameters, (E, ...) each, where they are no layers."""
    width: int
    """D of what goes in and comes out."""


def mixtures(base: nn.Module) -> list[Mixture]:
    """Every mixture of experts, found by a router with a row for each of its experts."""
    every = dict(base.named_modules())
    found: list[Mixture] = []
    for path, module in every.items():
        count, raw = _experts(path, module)
        parent, router = path, None
        while count and parent and router is None:
            parent = parent.rpartition(".")[0]
            router = _router(every[parent], parent, count, besides=path)
        if router is not None:
            found.append(Mixture(parent, every[parent], path, router[0], raw, router[1]))
    return found


def _router(module: nn.Module, path: str, count: int, besides: str) -> tuple[str, int] | None:
    """The first module inside, but not among the experts, that has a weight (E, D) for E = `count`; and its D."""
    for name, part in module.named_modules(prefix=path):
        weight = dict(part.named_parameters(recurse=False)).get("weight")
        if weight is not None and weight.dim() == 2 and len(weight) == count and not name.startswith(f"{besides}."):
            return name, weight.shape[1]
    return None


def _experts(path: str, module: nn.Module) -> tuple[int, tuple[str, ...]]:
    """How many experts a module holds (0: it holds none), and its parameters where these are no modules."""
    if isinstance(module, nn.ModuleList):
        many = re.fullmatch(r"(.*\.)?experts?", path) and all(any(map(is_linear, m.modules())) for m in module)
        return (len(module) if many else 0), ()
    if kind_of(module) is not None:
        return 0, ()
    raw = {n: len(p) for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and len(p) > 1}
    return (next(iter(raw.values())), tuple(raw)) if len(set(raw.values())) == 1 else (0, ())
