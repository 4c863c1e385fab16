"""The tensors of such a folder, by the module that they belong to."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...core.activation import activations
from ...core.adapter import Adapter

WEIGHTS = "adapter.safetensors"
_KEY = re.compile(
    r"^(?:(?P<path>.+?)\.)?(?P<group>adapters|loras|refts|prefix_tunings|invertible_adapters|shared_parameters)"
    r"\.(?P<name>[^.]+)\.(?P<rest>.+)$"
)
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}
Fill = Callable[[Adapter], None]
"""Gives an adapter that has been built the values of the file."""


@dataclass
class Tensors:
    """What a folder holds: (group, path of a module, rest of the key) -> value; what was asked for is marked."""

    by_place: dict[tuple[str, str, str], Tensor]

    def __post_init__(self) -> None:
        self.used: set[tuple[str, str, str]] = set()

    def paths(self, group: str) -> list[str]:
        """The modules that have something of this group, in the file's order."""
        return list(dict.fromkeys(path for own, path, _ in self.by_place if own == group))

    def take(self, group: str, path: str, rest: str) -> Tensor:
        """Raises ValueError where it is missing."""
        key = (group, path, rest)
        if key not in self.by_place:
            raise ValueError(f"{path}.{group}.….{rest} is missing in {WEIGHTS}.")
        self.used.add(key)
        return self.by_place[key]

    def has(self, group: str, path: str, rest: str) -> bool:
        return (group, path, rest) in self.by_place

    def left(self) -> list[str]:
        return [".".join(key) for key in self.by_place if key not in self.used]


def parsed(tensors: Mapping[str, Tensor], base: Any) -> dict[tuple[str, str, str], Tensor]:
    out: dict[tuple[str, str, str], Tensor] = {}
    for key, tensor in tensors.items():
        if ".prefix_tuning.pool." in key:  # the whole prefix over again, at each layer
            continue
        found = _KEY.match(key)
        if found is None:
            raise ValueError(f"{key!r} in {WEIGHTS} is not read here.")
        out[found["group"], _in_base(found["path"] or "", base), found["rest"]] = tensor
    return out


def _in_base(path: str, base: Any) -> str:
    """A path as this base has it, which may be the body alone, or have another head."""
    prefix = getattr(base, "base_model_prefix", "")
    bare = path.removeprefix(f"{prefix}.") if prefix else path
    first = bare.partition(".")[0]
    return f"{prefix}.{bare}" if prefix and hasattr(getattr(base, prefix, None), first) else bare


def copy(source: Tensor, target: Any, what: str) -> None:
    if source.shape != target.shape:
        raise ValueError(f"{what} has shape {tuple(source.shape)} in the file, {tuple(target.shape)} for this base.")
    target.copy_(source)


def activation(name: str) -> str:
    name = _ACTIVATIONS.get(name.lower(), name.lower())
    if name not in activations():
        raise ValueError(f"non_linearity={name!r} is not known to transformers.")
    return name
