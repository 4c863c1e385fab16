"""How LoRA's A and B start: one file for each way. Importing this package makes all of them known by name.

A start that takes its product from the base (PiSSA and its kin) does not change the base: what it has taken is kept in
the adapter, frozen, and subtracted there: W' = W + s (B A - B0 A0).
"""

import importlib
import math
import pkgutil
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core import target
from ..core.layer import Layer

Pair = tuple[Tensor, Tensor]
"""A (..., R, I K) and B (..., O, R), with the experts in front where there are some."""


@dataclass(frozen=True)
class Site:
    """What a start is made for: one layer, or one parameter."""

    layer: Layer
    rank: int
    scale: float
    option: str | None = None
    """What the start's name says beside itself: the number of "pissa_niter_4"."""
    settings: Any = None
    """The options of this start, where it has some."""

    def weight(self) -> Tensor:
        """(..., O, I K), in fp32 at least."""
        weight = self.layer.weight()
        dims = 2 if self.layer.kind.name == "experts" else 1
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., O, I K)"""
        shape, dims = self.layer.shape, 2 if self.layer.kind.name == "experts" else 1
        return (*shape[:dims], math.prod(shape[dims:]))

    def within_rank(self, name: str) -> None:
        """Raises ValueError where the weight has fewer singular values than there are ranks."""
        if self.rank > min(self.shape[-2:]):
            raise ValueError(
                f"LoraConfig: init_lora_weights={name!r} takes singular vectors of the weight, and {self.layer.path!r} "
                f"has {min(self.shape[-2:])}; r={self.rank} is too many. Give it fewer in rank_pattern."
            )


@dataclass(frozen=True)
class Start:
    """One way to start."""

    make: Callable[[Site], Pair | None]
    """None where it lacks the data that it looks at."""
    from_base: bool = False
    """Whether B A is taken from the base at the start, and has to be subtracted."""
    freezes_b: bool = False
    data: str = ""
    """The call that looks at data for it, where it needs some."""


_Make = TypeVar("_Make", bound=Callable[[Site], Pair | None])
STARTS: dict[bool | str, Start] = {}


def start(name: bool | str, **facts: Any) -> Callable[[_Make], _Make]:
    """Decorator: this function makes the start called `name`."""

    def add(make: _Make) -> _Make:
        STARTS[name] = Start(make, **facts)
        return make

    return add


_gathered: "weakref.WeakKeyDictionary[nn.Module, dict[str, Any]]" = weakref.WeakKeyDictionary()
"""Layer of a base -> start -> what has been found out for it from data."""


def gather(module: nn.Module, name: str, found: Any) -> None:
    """Keeps what a start that looks at data needs at a layer, for the next adapter that starts so."""
    _gathered.setdefault(module, {})[name] = found


def gathered(module: nn.Module, name: str) -> Any:
    """What was kept for this start, which is given up; None if nothing was."""
    return _gathered.get(module, {}).pop(name, None)


_NUMBERED = re.compile(r"(\w+_niter_)(\d+)")


def known(name: object) -> bool:
    """Whether `init_lora_weights` may say this."""
    if isinstance(name, str):
        found = _NUMBERED.fullmatch(name)
        return f"{found[1]}[n]" in STARTS if found else name in STARTS and "[" not in name
    return isinstance(name, bool)


def named(name: bool | str) -> tuple[Start, str | None]:
    """The start that `init_lora_weights` names, and the number at the end of "pissa_niter_4"."""
    if found := _NUMBERED.fullmatch(str(name)):
        return STARTS[f"{found[1]}[n]"], found[2]
    return STARTS[name], None


def rank_and_scale(config: Any, path: str) -> tuple[int, float]:
    """r and alpha / r, or alpha / sqrt(r), of a LoraConfig at one place."""
    r = target.matching(config.rank_pattern, path, config.r)
    alpha = target.matching(config.alpha_pattern, path, config.lora_alpha)
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


@dataclass(frozen=True)
class Begun:
    """What a site starts with: copies that belong to nobody else."""

    pair: Pair
    taken: Pair | None
    """A0 and B0, where B A was taken from the base."""
    waits: str
    """The call that has to come before it trains, where it lacks data."""


def begin(name: bool | str, layer: Layer, rank: int, scale: float, settings: Any = None) -> Begun:
    """Starts a site by the name that `init_lora_weights` gives. Where values come later, all are zero."""
    how, option = named(name)
    at = Site(layer, rank, scale, option, settings)
    *experts, out, inside = at.shape
    made = None if layer.blank else how.make(at)
    waits = how.data if made is None and not layer.blank else ""
    if made is None and not layer.blank:
        made = STARTS[True].make(at)
    a, b = made or (torch.zeros(*experts, rank, inside), torch.zeros(*experts, out, rank))
    return Begun((_own(a), _own(b)), (_own(a), _own(b)) if how.from_base else None, waits)


def _own(made: Tensor) -> Tensor:
    return made.clone(memory_format=torch.contiguous_format)


for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
