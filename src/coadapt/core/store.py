"""Reading and writing the weight of a layer, whatever holds it. Quantisers add a row from quant/."""

from typing import Any, Protocol

from torch import Tensor, nn


class Store(Protocol):
    """How one class of modules holds its weight."""

    def read(self, module: nn.Module) -> Tensor: ...

    def write(self, module: nn.Module, weight: Tensor) -> None: ...


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

    def read(self, module: nn.Module) -> Tensor:
        return value(module, "weight")

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """A new Parameter: the old one may be shared with another module, which must keep its value."""
        old = module.get_parameter("weight")
        module.weight = nn.Parameter(weight.to(dtype=old.dtype, device=old.device).contiguous(), requires_grad=False)


STORES: dict[type[nn.Module], Store] = {}
_PLAIN = Plain()


def store_of(module: nn.Module) -> Store:
    """The store of the first class in STORES that `module` is an instance of, else the plain one."""
    return next((store for cls, store in STORES.items() if isinstance(module, cls)), _PLAIN)


def stamp(tensor: Tensor) -> tuple[Any, ...] | None:
    """Differs once a tensor was written to in place, trains, or lies elsewhere; None where PyTorch counts no writes."""
    return None if tensor.is_inference() else (tensor._version, tensor.data_ptr(), tensor.requires_grad)
