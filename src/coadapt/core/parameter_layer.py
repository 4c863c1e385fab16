"""Parameters that belong to no layer, seen as weights of layers: matrices, fused experts, single experts of those."""

from typing import Any

import torch
from torch import Tensor, nn

from .layer import Kind, Layer, same, transposed
from .precision import squares
from .store import value


def _no_call(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    raise TypeError("A parameter has no call of its own: only maps of weights adapt it.")


EXPERTS = Kind("experts", _no_call)
_TRANSPOSED_EXPERTS = Kind("experts", _no_call, transposed)
MATRIX = Kind("linear", _no_call, same)


class ParameterLayer(Layer):
    """A parameter of a module, seen as the weight of a layer: (O, I), or (E, O, I), of which `expert` is one."""

    def __init__(self, module: nn.Module, path: str, name: str, expert: int | None = None) -> None:
        super().__init__(module, path)
        self.name, self.expert = name, expert
        self.site = whole(path)

    @property
    def _stored(self) -> Kind:
        match self.module.get_parameter(self.name).dim():
            case 3:
                # transformers' experts say so where they are stored as (E, I, O)
                return _TRANSPOSED_EXPERTS if getattr(self.module, "is_transposed", False) else EXPERTS
            case 2:
                return MATRIX
            case dims:
                raise ValueError(f"{self.path!r} has {dims} dims; a matrix (O, I) or experts (E, O, I) can be adapted.")

    @property
    def kind(self) -> Kind:
        return self._stored if self.expert is None else MATRIX

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._of(torch.empty(self.module.get_parameter(self.name).shape, device="meta")).shape)

    @property
    def bias(self) -> Tensor | None:
        return None

    def weight(self) -> Tensor:
        return self._of(value(self.module, self.name))

    def _of(self, stored: Tensor) -> Tensor:
        weights = self._stored.canonical(stored)
        return weights if self.expert is None else weights[self.expert]

    def squares(self) -> Tensor:
        return squares(self.weight())


def numbered(path: str, expert: int) -> str:
    """What one expert of the parameter at `path` is called."""
    return f"{path}[{expert}]"


def whole(path: str) -> str:
    """Undoes `numbered`; another path stays as it is."""
    return path.rpartition("[")[0] if path.endswith("]") else path


def layer_at(place: Any) -> Layer:
    """What stands at a Place."""
    if place.parameter:
        return ParameterLayer(place.module, place.path, place.parameter, place.expert)
    return Layer(place.module, place.path)
