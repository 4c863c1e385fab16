"""What is known of a base model while adapters are attached to it: whose sites, what trained before, what is merged."""

import hashlib
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import site
from .roles import HEADS, word_embeddings
from .store import held, packed_store, quantised, stamp, value
from .tied import weights

_BASES: "weakref.WeakKeyDictionary[nn.Module, Base]" = weakref.WeakKeyDictionary()


def base_of(model: nn.Module) -> "Base":
    """The record of a base model; made for the first view, and gone with the last."""
    if model not in _BASES:
        _BASES[model] = Base(model)
    return _BASES[model]


class Base:
    """One record per base model, shared by all of its views."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.lock = threading.RLock()
        self.views: set[int] = set()
        self.sites: Counter[nn.Module] = Counter()
        self.running: Counter[int] = Counter()
        """How many calls each view is in."""
        self.below: Base | None = None
        """Of the model that this one shares its weights with, where its blocks are repeated (replication.py)."""
        self.merged_by: int | None = None
        self.trained: list[nn.Parameter] = []
        self.counting: list[nn.Module] = []
        """Layers that kept running statistics before: those are part of the base, and frozen while views last."""
        self.steadied: list[tuple[nn.Module, Callable[[], None]]] = []
        """What undoes that quantised layers keep their layout while views last."""
        self._fingerprint = ""
        self._weights: list[Any] = []
        self.checkpointing = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        """Modules that may checkpoint: as sites they take the frame along into recomputation."""

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None
        return model

    def enter(self, view: int) -> None:
        """A view begins to use the base: the first freezes it."""
        with self.lock:
            if not self.views:
                refuse_split_layers(self.model)
                self.trained = [p for p in self.model.parameters() if p.requires_grad]
                self.model.requires_grad_(False)
                self.counting = [m for m in statistics(self.model) if m.training]
                found = [(module, store.steady(module)) for _, module, store in quantised(self.model)]
                self.steadied = [(module, undo) for module, undo in found if undo is not None]
            self.views.add(view)
            if self.below is not None:
                self.below.enter(view)

    def leave(self, view: int, modules: Iterable[nn.Module]) -> None:
        """A view goes: its sites are taken off; the last one restores what trained before."""
        with self.lock:
            if view not in self.views:
                return
            self.detach(modules)
            self.views.discard(view)
            if self.merged_by == view:
                self.merged_by = None
            if self.below is not None:
                self.below.leave(view, ())
            if not self.views:
                for parameter in self.trained:
                    parameter.requires_grad_(True)
                for module, undo in self.steadied:
                    if packed_store(module) is not None:
                        undo()
                if (model := self._model()) is not None:
                    for module in self.counting:
                        module.train(model.training)
                    _BASES.pop(model, None)

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Makes modules sites, counting who needs them."""
        with self.lock:
            for module in modules:
                self.sites[module] += 1
                site.make(module)

    def detach(self, modules: Iterable[nn.Module]) -> None:
        """Takes away one need for each of `modules`; those that nobody needs are plain modules again."""
        with self.lock:
            for module in modules:
                self.sites[module] -= 1
                if self.sites[module] <= 0:
                    del self.sites[module]
                    site.unmake(module)

    @property
    def fingerprint(self) -> str:
        """Tells bases apart: names and shapes of all weights, and a sample of their values rounded to bf16.

        Made again only where a weight is another one, or was written to, since the last time. While adapters are merged
        into the weights, or these lie in parts on several processes, it is what it was before.
        """
        if not self._fingerprint or (self.merged_by is None and not in_parts(self.model)):
            now = [(id(p), stamp(p)) for module in self.model.modules() for p in held(module)]
            if not self._fingerprint or now != self._weights:
                self._fingerprint, self._weights = fingerprint(self.model), now
        return self._fingerprint


def statistics(model: nn.Module) -> list[nn.Module]:
    """The layers that count along in training (BatchNorm): in evaluation mode their statistics stay as they are."""
    return [m for m in model.modules() if "running_mean" in dict(m.named_buffers(recurse=False))]


def refuse_split_layers(model: nn.Module) -> None:
    """Raises ValueError where layers are split by tensor parallelism: their weights are parts, and no fully_shard's."""
    if not in_parts(model):
        return
    tensors, sharding = sys.modules["torch.distributed.tensor"], sys.modules.get("torch.distributed.fsdp")
    whole = sharding is not None and any(isinstance(m, sharding.FSDPModule) for m in model.modules())
    parts: list[tuple[str, Any]] = list(model.named_parameters())
    for name, p in parts:
        if isinstance(p, tensors.DTensor) and (not whole or p.device_mesh.ndim > 1):
            raise ValueError(
                f"{name} is split by tensor parallelism ({p.placements} on a mesh of {tuple(p.device_mesh.shape)}). "
                "Such layers run code of their own, which passes adapters by in silence. Load the model without "
                "tp_plan; fully_shard and device_map also spread it over devices (docs/devices.md)."
            )


def in_parts(module: nn.Module) -> bool:
    """Whether weights lie in parts on several processes (`fully_shard`, tensor parallelism)."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(isinstance(p, tensors.DTensor) for p in module.parameters())


FIRST = 16
"""Rows of a vocabulary that a fingerprint looks at."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """`"<structure>-<values>"`, 16 hexadecimal digits each. The same in fp32 and bf16; unknown values are left out."""
    structure, values = hashlib.sha256(), hashlib.sha256()
    modules = dict(model.named_modules())
    weight = weights(model, modules.values())
    vocabulary = {id(weight[m]) for m in word_embeddings(model)}
    named: dict[int, str] = {}
    for path, module in modules.items():
        for name, tensor in _named(module):
            which = weight[module] if name == "weight" and isinstance(tensor, nn.Parameter) else tensor
            named.setdefault(id(which), f"{path}.{name}" if path else name)
    for which, name in sorted(named.items(), key=lambda item: item[1]):
        if name.partition(".")[0] in HEADS:  # new at each load; what was trained of it is in the adapter
            continue
        owner, _, last = name.rpartition(".")
        parameter = _floats(modules[owner], last)
        words = which in vocabulary  # whose size may change, and with it the last rows
        structure.update(f"{name}:{tuple(parameter.shape[1:] if words else parameter.shape)};".encode())
        if parameter.is_floating_point() and not parameter.is_meta and parameter.numel():
            values.update(_sample(parameter[:FIRST] if words else parameter))
    return f"{structure.hexdigest()[:16]}-{values.hexdigest()[:16]}"


def _named(module: Any) -> list[tuple[str, Tensor]]:
    """What a module holds itself, by name; a quantised layer has the names of one that is not."""
    store = packed_store(module)
    if store is None:
        return list(module.named_parameters(recurse=False))
    bias = getattr(module, "bias", None)
    return [("weight", store.parts(module)[0]), *([] if bias is None else [("bias", bias)])]


def _floats(module: Any, name: str) -> Tensor:
    store = packed_store(module)
    if store is None:
        return value(module, name)
    return store.read(module) if name == "weight" else module.bias


def _sample(parameter: Tensor, count: int = 64) -> bytes:
    flat = parameter.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
    chosen: Any = flat[index].to(torch.bfloat16).cpu().view(torch.int16)
    return chosen.numpy().tobytes()
