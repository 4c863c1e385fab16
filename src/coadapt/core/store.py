"""Reading and writing the weight of a layer, whatever holds it. Quantisers are found by quant/, which adds to FINDERS.

Nothing here multiplies by a quantised weight: the module's own call does, and no copy of it as floats is kept.
"""

import functools
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .site import become, new, plain_class


class Store(Protocol):
    """How one class of modules holds its weight."""

    packed: bool
    """Whether that is something else than a parameter of floats."""

    def read(self, module: nn.Module) -> Tensor:
        """The weight as floats, in the order in which the module's class has it; a new tensor where it is packed."""
        ...

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Holds another weight in the same way: what is packed is quantised anew. No tensor is written to in place."""
        ...

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """Of what `read` gives."""
        ...

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of what `read` gives."""
        ...

    def parts(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The tensors that hold the weight."""
        ...


def value(module: Any, name: str) -> Tensor:
    """A parameter's value, detached; also where accelerate keeps it elsewhere. On meta where nobody has it."""
    own = module.get_parameter(name).detach()
    if own.is_meta and (hook := getattr(module, "_hf_hook", None)) is not None:
        for one in getattr(hook, "hooks", [hook]):
            if (elsewhere := getattr(one, "weights_map", None)) is not None:
                return elsewhere[name]
    return own


class Plain:
    """A weight that is a parameter of floats, as PyTorch's own layers have it."""

    packed = False

    def read(self, module: nn.Module) -> Tensor:
        return value(module, "weight")

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """A new Parameter: the old one may be shared with another module, which must keep its value."""
        old = module.get_parameter("weight")
        module.weight = nn.Parameter(weight.to(dtype=old.dtype, device=old.device).contiguous(), requires_grad=False)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return tuple(module.get_parameter("weight").shape)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return module.get_parameter("weight").dtype

    def parts(self, module: nn.Module) -> tuple[Tensor, ...]:
        return (module.get_parameter("weight"),)


class Packed(ABC):
    """A quantised weight. What a quantiser fills in: reading, quantising anew, and which tensors there are."""

    packed = True
    called: str
    """What a person calls it, as "bnb 4bit"."""
    own: tuple[str, ...] = ()
    """Attributes by which the module holds its weight, beside parameters and buffers."""

    @abstractmethod
    def read(self, module: Any) -> Tensor: ...

    @abstractmethod
    def write(self, module: Any, weight: Tensor) -> None: ...

    @abstractmethod
    def dtype(self, module: Any) -> torch.dtype: ...

    @abstractmethod
    def parts(self, module: Any) -> tuple[Tensor, ...]: ...

    def shape(self, module: Any) -> tuple[int, ...]:
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        return module.out_features, module.in_features

    def steady(self, module: Any) -> Callable[[], None] | None:
        """Sees to it that calls leave the weight as it is, hand a gradient on to their input, and keep no floats for
        that. Returns what undoes it."""
        return None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[..., Tensor], module: Any) -> Tensor:
        ctx.module = module
        return call(module, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = gradients
        return g @ store_of(ctx.module).read(ctx.module).to(g.dtype), None, None


class Recomputing:
    """Mixed into the class of a quantised linear layer that would keep its weight as floats for the backward, or has
    none: the call is the module's own, and the backward reads the weight again."""


@functools.cache
def _recomputing(cls: type[Any]) -> type[Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
            return _Recomputed.apply(x, cls.forward, self)  # type: ignore[no-any-return]
        return cls.forward(self, x)

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy is as its library has it, until a view has it steadied."""
        return new, (cls,), dict(self.__dict__)

    body: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__}
    body["_coadapt_below"] = cls
    made = types.new_class(cls.__name__, (Recomputing, cls), exec_body=lambda namespace: namespace.update(body))
    made.__qualname__ = cls.__qualname__
    return made


def recompute(module: nn.Module) -> Callable[[], None]:
    """Has a quantised linear layer read its weight again in the backward; returns what undoes that."""
    cls = plain_class(type(module))
    if not issubclass(cls, Recomputing):
        become(module, _recomputing(cls))
    below = vars(plain_class(type(module)))["_coadapt_below"]
    return functools.partial(become, module, below)


FINDERS: list[Callable[[nn.Module], Packed | None]] = []
_PLAIN = Plain()


def store_of(module: nn.Module) -> Store:
    """The store of a quantiser that knows `module`, else the plain one."""
    return packed_store(module) or _PLAIN


def packed_store(module: nn.Module) -> Packed | None:
    """The store of a module whose weight is quantised, or None."""
    if type(module.__dict__["_parameters"].get("weight")) is nn.Parameter:
        return None  # at once for almost all: what quantisers hold has classes of their own, or another name
    return next((found for find in FINDERS if (found := find(module)) is not None), None)


def quantised(model: nn.Module) -> Iterator[tuple[str, nn.Module, Packed]]:
    """Every module of `model` that holds a quantised weight, with its path and store."""
    for path, module in model.named_modules():
        if (store := packed_store(module)) is not None:
            yield path, module, store


def count(model: nn.Module) -> int:
    """How many numbers the weights of a model are; of quantised ones, those that they stand for."""
    stored = sum(p.numel() for p in model.parameters())
    for _, module, store in quantised(model):
        kept = sum(p.numel() for name, p in module.named_parameters(recurse=False) if name != "bias")
        stored += math.prod(store.shape(module)) - kept
    return stored


def held(module: nn.Module) -> Iterator[Tensor]:
    """The tensors of one module, without those inside of it, that hold its values."""
    if (store := packed_store(module)) is not None:
        yield from store.parts(module)
    yield from (p for p in module.parameters(recurse=False) if store is None or p.is_floating_point())


def stamp(tensor: Tensor) -> tuple[Any, ...] | None:
    """Differs once a tensor was written to in place, trains, or lies elsewhere; None where PyTorch counts no writes."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), tensor.requires_grad)


# ---- forms: what a module consists of -------------------------------------------------------------------------------

_OWN_LIFE = ("training", "forward", "_old_forward", "_hf_hook")
"""What changes for other reasons, and stays as it is where a module takes another form."""


def form_of(module: nn.Module) -> Any:
    """A module of the same plain class that shares all tensors with `module`: a copy of what it consists of."""
    made = new(plain_class(type(module)))
    made.__dict__ = {
        k: v.copy() if k in ("_parameters", "_buffers", "_modules") else v for k, v in vars(module).items()
    }
    return made


def take_form(module: nn.Module, form: nn.Module) -> None:
    """Makes `module` what `form` is: its class, parameters and attributes. It stays the same object, and a site."""
    own, new = vars(module), vars(form)
    for name in (own.keys() | new.keys()) - set(_OWN_LIFE):
        if name not in new:
            del own[name]
        elif name in ("_parameters", "_buffers", "_modules"):
            own[name].clear()
            own[name].update(new[name])
        else:
            own[name] = new[name]
    become(module, type(form))


def float_form(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """PyTorch's own layer with this weight and bias, in the place of a quantised one."""
    made, store = form_of(module), packed_store(module)
    assert store is not None
    for name in (*store.own, "weight", "bias", "extra_repr"):
        made.__dict__.pop(name, None)
    made.__dict__["_buffers"].clear()
    made.__dict__["_parameters"].clear()
    made.__class__ = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if not isinstance(made, nn.Embedding):
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(weight), False))
    return made
