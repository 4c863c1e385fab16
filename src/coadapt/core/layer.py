"""A layer as a method sees it: callable, with a float weight in (O, I, *K) order. Dtypes: here and in precision.py."""

import sys
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .precision import scaled, squares
from .site import plain_class
from .store import packed_store, stamp, store_of, value


def _linear(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _conv(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    return module._conv_forward(x, weight, None)


def _embedding(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    y = F.embedding(x, weight.mT, module.padding_idx)
    return y * module.embed_scale if hasattr(module, "embed_scale") else y  # transformers' scaled embeddings


def _norm(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, weight, None, module.eps)


def _group_norm(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    return F.group_norm(x, module.num_groups, weight, None, module.eps)


def _other_norm(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """By the norm's own code: models have dozens of them, which differ in a cast or in a 1 that is added."""
    bias = getattr(module, "bias", None)
    values = {"weight": weight, "bias": None if bias is None else torch.zeros_like(bias)}
    return plain_class(type(module)).forward(StandIn(module, values), x)


class StandIn:
    """A module as its own code sees it, with other values; the module is not touched, since others may be in it."""

    def __init__(self, module: nn.Module, values: Mapping[str, Any]) -> None:
        self._module, self._values = module, values

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values else getattr(self._module, name)


def same(weight: Tensor) -> Tensor:
    return weight


def transposed(weight: Tensor) -> Tensor:
    return weight.mT


@dataclass(frozen=True)
class Kind:
    """How one class of layers uses its weight."""

    name: str
    apply: Callable[[Any, Tensor, Tensor], Tensor]
    """(module, x, weight in (O, I, *K) order) -> output without the bias."""
    canonical: Callable[[Tensor], Tensor] = same
    """The stored weight to (O, I, *K); its own inverse."""
    channel: int = -1
    """The dim of O in the output."""
    factors: bool = True
    """Whether the weight is a matrix, or convolution kernels, that can be written as a product."""


LINEAR = Kind("linear", _linear)
KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: LINEAR,
    nn.Embedding: Kind("embedding", _embedding, transposed),
    nn.Conv1d: Kind("conv", _conv, channel=1),
    nn.Conv2d: Kind("conv", _conv, channel=1),
    nn.Conv3d: Kind("conv", _conv, channel=1),
    nn.LayerNorm: Kind("norm", _norm, factors=False),
    nn.GroupNorm: Kind("norm", _group_norm, channel=1, factors=False),
}
_OTHER_NORM = Kind("norm", _other_norm, factors=False)
_CONV1D = Kind("linear", _linear, transposed)  # GPT-2's: a linear layer whose weight is stored as (I, O)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of layer that `module` is, or None for a module that has no single weight."""
    for cls, kind in KINDS.items():
        if isinstance(module, cls):
            return kind
    shapes = sys.modules.get("transformers.pytorch_utils")
    if shapes is not None and isinstance(module, shapes.Conv1D):
        return _CONV1D
    if hasattr(module, "in_features") and (hasattr(module, "weight") or packed_store(module) is not None):
        return LINEAR
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, nn.Parameter) and weight.dim() == 1 and not hasattr(module, "track_running_stats")
    return _OTHER_NORM if plain and "Norm" in type(module).__name__ else None


_SQUARES: MutableMapping[Tensor, tuple[Any, Tensor]] = WeakTensorKeyDictionary()
"""A tensor of a weight -> where its values lay and how often they had been changed, and the squared lengths of its rows
then."""


class Layer:
    """The frozen layer at `path`. Subclasses are the same layer seen through an adapter."""

    role: str = ""
    """What the method's `places` said of it."""
    blank: bool = False
    """Told to a method that is made: its values come later, so none need be worked out from the weight."""

    def __init__(self, module: nn.Module, path: str = "", call: Callable[[Any], Any] | None = None) -> None:
        self.module, self.path, self.call = module, path, call
        self.site = path
        """What gates call it: its path, or another name where its methods read something else than its input."""

    @property
    def kind(self) -> Kind:
        """Raises TypeError for a module without a single weight."""
        kind = kind_of(self.module)
        if kind is None:
            known = ", ".join(cls.__name__ for cls in KINDS)
            raise TypeError(
                f"{self.path!r} is a {type(self.module).__name__}, which has no single weight to adapt. Target one of "
                f"its layers ({known}), or use a method that works on activations (BottleneckConfig)."
            )
        return kind

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I, *K); (O,) for a norm."""
        stored, order = store_of(self.module).shape(self.module), self.kind.canonical
        return stored if order is same else tuple(order(torch.empty(stored, device="meta")).shape)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def width(self) -> int | None:
        """D of what the module returns, or None where its layers do not tell."""
        if kind_of(self.module) is not None:
            return self.shape[0]
        inner = [Layer(m) for m in self.module.modules() if (k := kind_of(m)) is not None and k.name != "embedding"]
        return inner[-1].shape[0] if inner else None

    @property
    def input_width(self) -> int | None:
        """D of what the module is given, or None where its layers do not tell."""
        if (kind := kind_of(self.module)) is not None:
            return self.shape[1] if kind.factors else self.shape[0]
        inner = [Layer(m) for m in self.module.modules() if (k := kind_of(m)) is not None and k.name != "embedding"]
        return inner[0].input_width if inner else None

    def weight(self) -> Tensor:
        """(O, I, *K), detached."""
        return self.kind.canonical(store_of(self.module).read(self.module))

    def squares(self) -> Tensor:
        """(O,) the squared length of each row of the weight; kept for as long as the weight is the same."""
        parts = self._parts()
        if torch.compiler.is_compiling() or None in (now := [stamp(part) for part in parts]):
            return squares(self.weight())
        if (known := _SQUARES.get(parts[0])) is None or known[0] != now:
            known = _SQUARES[parts[0]] = now, squares(self.weight())
        return known[1]

    def _parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold the weight, and where that lies if accelerate keeps it elsewhere."""
        store = store_of(self.module)
        return store.parts(self.module) if store.packed else (*store.parts(self.module), self.weight())

    def value(self, name: str) -> Tensor:
        """A parameter of the module, as it is stored; detached."""
        return value(self.module, name)

    def __call__(self, x: Any) -> Any:
        assert self.call is not None
        return self.call(x)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's operation with another weight, (O, I, *K), and bias, (O,)."""
        y = self.kind.apply(self.module, x, weight.to(x.dtype) if x.is_floating_point() else weight)
        return y if bias is None else y + self.along_channels(bias.to(y.dtype), y)

    def mix(self, y: Tensor, matrix: Tensor) -> Tensor:
        """The channels of y multiplied by `matrix`, (O, R)."""
        return F.linear(y, matrix) if self.kind.channel == -1 else torch.einsum("or,br...->bo...", matrix, y)

    def scaled(self, y: Tensor, factors: Tensor) -> Tensor:
        """y with each channel multiplied by one of `factors`, (O,)."""
        return scaled(y, self.along_channels(factors, y))

    def along_channels(self, vector: Tensor, y: Tensor) -> Tensor:
        """A vector over O, shaped to broadcast against y."""
        return vector.view(-1, *[1] * (y.dim() - 2)) if self.kind.channel == 1 else vector

    def like(self) -> Tensor:
        """A tensor of the module's device and floating dtype, for making parameters beside it."""
        for module in self.module.modules():
            if (store := packed_store(module)) is not None:
                return torch.empty(0, dtype=store.dtype(module), device=store.parts(module)[0].device)
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():
                    return parameter
        return torch.empty(0)


class Around(Layer):
    """`inner`, changed."""

    def __init__(self, inner: Layer) -> None:
        super().__init__(inner.module, inner.path)
        self.inner, self.site = inner, inner.site

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias

    def __call__(self, x: Any) -> Any:
        return self.inner(x)

    def weight(self) -> Tensor:
        return self.inner.weight()

    def squares(self) -> Tensor:
        return squares(self.weight())


class Known(Around):
    """`inner`, whose answer to x is known to be y: spares the frozen layer a second run."""

    def __init__(self, inner: Layer, x: Any, y: Any) -> None:
        super().__init__(inner)
        self.x, self.y = x, y

    def __call__(self, x: Any) -> Any:
        return self.y if x is self.x else self.inner(x)

    def squares(self) -> Tensor:
        return self.inner.squares()


class Cast(Around):
    """`inner`, called with z in the adapter's dtype where the model passed x."""

    def __init__(self, inner: Layer, z: Tensor, x: Tensor) -> None:
        super().__init__(inner)
        self.z, self.x = z, x
        self.dtype = x.dtype
        """Of what the layer gave last: under autocast another than that of its input."""

    def __call__(self, x: Tensor) -> Any:
        y = self.inner(self.x if x is self.z else x.to(self.x.dtype))
        self.dtype = y.dtype if isinstance(y, Tensor) else self.dtype
        return y


class Adapted(Around):
    """`inner` with one method around it."""

    def __init__(self, inner: Layer, method: Any) -> None:
        super().__init__(inner)
        self.method = method

    @property
    def bias(self) -> Tensor | None:
        return self.method.new_bias(self.inner) if hasattr(self.method, "new_bias") else self.inner.bias

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            y = self.method(x, self.inner)
            return y.to(self.module_dtype(y))
        if not self.method.widens:
            return self.method(x, self.inner)
        own = next((p.dtype for p in self.method.parameters() if p.is_floating_point()), None)
        z = x if own is None else x.to(own)
        inner = Cast(self.inner, z, x)
        y = self.method(z, inner)
        return y.to(inner.dtype)

    def module_dtype(self, y: Tensor) -> torch.dtype:
        return self.like().dtype if y.is_floating_point() else y.dtype

    def weight(self) -> Tensor:
        """As far as it is changed by maps of weights: what works on activations leaves it as it is."""
        below = self.inner.weight()
        return self.method.merge(below) if hasattr(self.method, "merge") else below
