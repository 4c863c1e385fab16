"""What is attached where, active, merged, trained and on which device: by the field's calls and fields for that."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from .adapter import ModuleCopy, Part
from .method import WeightMethod
from .store import count, packed_store
from .view import View

Irregular = Literal["irregular"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TunerLayerStatus:
    """One place with adapters."""

    name: str
    """Its path in the base."""
    module_type: str
    """Methods and class, as "lora.Linear"."""
    enabled: bool
    """Whether anything takes part in a call that does not say otherwise."""
    active_adapters: list[str]
    """Those that are active, of the whole model."""
    merged_adapters: list[str]
    """Those that are merged into the weights here."""
    requires_grad: dict[str, bool | Irregular]
    """Of the parameters that each adapter has here; "irregular" where some train and others do not."""
    available_adapters: list[str]
    """Those that are attached here, sorted."""
    devices: dict[str, list[str]]
    """Where each adapter's tensors are: "cpu", "cuda"."""
    quantization_backend: str | None
    """What the weight here is quantised with, as "bnb 4bit"; None where it is floats."""


@dataclass(frozen=True, kw_only=True)
class TunerModelStatus:
    """The same of a whole model; "irregular" where its places differ."""

    base_model_type: str
    """The class of the base."""
    adapter_model_type: str
    """The class of the view."""
    peft_types: dict[str, str]
    """The method of each adapter."""
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """What is at each place that has adapters, by the paths of the base.

    Raises:
        TypeError: `model` is no view.
    """
    if not isinstance(model, View):
        raise TypeError(f"get_layer_status takes a PeftModel; got a {type(model).__name__}.")
    active = model.active_adapters
    merged = model.merged_adapters
    places: dict[str, dict[str, list[Part]]] = {}
    for name in model.peft_config:
        for part in model.get_adapter(name).parts:
            at = ".".join(filter(None, (part.place.path, part.place.parameter)))
            places.setdefault(at, {}).setdefault(name, []).append(part)
    return [_layer(path, here, active, merged) for path, here in sorted(places.items())]


def _layer(path: str, here: dict[str, list[Part]], active: list[str], merged: Sequence[str]) -> TunerLayerStatus:
    parts = [part for found in here.values() for part in found]
    methods = dict.fromkeys(_called(part) for part in parts)
    store = packed_store(parts[0].place.module)
    flat = {name: [t for part in found for t in _tensors(part.method)] for name, found in here.items()}
    trained = {
        name: [p.requires_grad for part in found for p in part.method.parameters()] for name, found in here.items()
    }
    return TunerLayerStatus(
        name=path,
        module_type=f"{' + '.join(methods)}.{type(parts[0].place.module).__name__}",
        enabled=bool(active),
        active_adapters=active,
        merged_adapters=[n for n in merged if any(isinstance(p.method, WeightMethod) for p in here.get(n, ()))],
        requires_grad={name: found for name, said in trained.items() if (found := _of_all(said)) is not None},
        available_adapters=sorted(here),
        devices={name: sorted({t.device.type for t in tensors}) for name, tensors in flat.items()},
        quantization_backend=None if store is None else store.called,
    )


def _called(part: Part) -> str:
    return "modules_to_save" if isinstance(part.method, ModuleCopy) else type(part.method).__name__.lower()


def _tensors(module: nn.Module) -> Iterable[Any]:
    yield from module.parameters()
    yield from module.buffers()


def _of_all(values: Iterable[T]) -> T | Irregular | None:
    """What all are; "irregular" where they differ, None where there are none."""
    found = list(values)
    return None if not found else found[0] if all(v == found[0] for v in found) else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The same of the model as a whole. Raises as `get_layer_status`."""
    layers = get_layer_status(model)
    assert isinstance(model, View)
    names = sorted(model.peft_config)
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    half = any(set(merged) & (set(layer.available_adapters) - set(layer.merged_adapters)) for layer in layers)
    trained: dict[str, Any] = {}
    for name in names:
        said = _of_all(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
        if said is not None:
            trained[name] = said
    return TunerModelStatus(
        base_model_type=type(model.base).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: str(config.peft_type) for name, config in model.peft_config.items()},
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_params=count(model),
        num_adapter_layers=len(layers),
        enabled=bool(model.active_adapters),
        active_adapters=model.active_adapters,
        merged_adapters="irregular" if half else merged,
        requires_grad=trained,
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, ())}) for n in names},
        quantization_backend=_of_all(layer.quantization_backend for layer in layers),
    )
