"""A base with adapters in its weights, written tensor by tensor: for models that are larger than memory.

The base is loaded by transformers with its weights left on disk, so that the names of files and of modules are matched
as they always are; each weight is read when its turn comes, changed by the code that merges in memory, and written to
its place in a file whose size is known beforehand.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..core import merging
from ..core.adapter import ModuleCopy, Part
from ..core.around import around
from ..core.composition import Node, names
from ..core.layer import Layer, kind_of
from ..core.replication import replication_of
from ..core.store import value
from ..model import PeftModel

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "50GB"
"""transformers' own limit for one file."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@torch.no_grad()
def merge_to(view: PeftModel, where: Path, max_shard_size: int | str = SHARD) -> int:
    """Writes the base of `view`, whose weights wait on disk, with the view's composition in it, into a folder.

    What stands there afterwards is what `merge_and_unload().save_pretrained(where)` writes. The view is of no use then.

    Returns:
        The size of the largest weight in bytes: what had to be in memory, a few times over.

    Raises:
        TypeError: part of the composition is no change of weights.
        ValueError: a weight becomes infinite, or the files join weights that the model has apart.
    """
    base: Any = view.base
    if replication_of(base) is not None:
        raise ValueError(
            "Blocks of this base are there several times (layer_replication), which cannot be merged from file to "
            "file. Merge in memory: without --stream, or merge_and_unload()."
        )
    adapters = {name: view.get_adapter(name) for name in names(view.composition)}
    merging.refuse_beside(adapters, view.composition)
    changes = _Changes(base, merging.changed(adapters, view.composition), view.composition)
    changes.prepare()
    if changes.biased:
        merging.warn_of_new_biases(base, len(changes.biased))
    merging.untie(base)
    base.config.dtype = str(base.dtype).removeprefix("torch.")
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(where)
    if base.can_generate():
        base.generation_config.save_pretrained(where)
    state = base.state_dict()
    for name in base._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, base)
    outlines = {name: tensor.to("meta") for name, tensor in state.items()}
    written = revert_weight_conversion(base, outlines)
    _refuse_joined(base, outlines, written)
    files = _laid_out(base, where, written, max_shard_size)
    for name, tensor in state.items():
        new = changes.new(name, tensor)
        for key, piece in revert_weight_conversion(base, {name: new}).items():
            files[key].write(key, piece)
        del new
    return max(t.numel() * t.element_size() for t in state.values())


@dataclass
class _Changes:
    """The weights of a base as a composition makes them, each when it is asked for."""

    base: nn.Module
    sites: merging.Changed
    node: Node
    made: dict[str, Tensor] = field(default_factory=dict)
    """What was made along with something else (a bias with its weight) and is still to be asked for."""
    biased: set[nn.Module] = field(default_factory=set)
    """Layers that have no bias yet, and will have one."""

    def prepare(self) -> None:
        """Gives the base the parameters, without values, that it has once merged: new biases, other dtypes, no ties
        where what was tied becomes different."""
        self.paths = {module: path for path, module in self.base.named_modules()}
        self.owner: dict[str, tuple[nn.Module, str]] = {}
        for (module, parameter), parts in self.sites.items():
            for name in self._names(module, parameter, parts):
                self.owner[name] = (module, parameter)
        self._untie()

    def _names(self, module: nn.Module, parameter: str, parts: Mapping[str, Sequence[Part]]) -> list[str]:
        path = self.paths[module]
        found = [part.method for own in parts.values() for part in own]
        if parameter:
            return [f"{path}.{parameter}"]
        if copies := [method for method in found if isinstance(method, ModuleCopy)]:
            copied: Any = copies[0].copy
            for name, new in copied.named_parameters():
                inside, _, end = name.rpartition(".")
                owner = module.get_submodule(inside)
                layers = end == "weight" and kind_of(owner) is not None  # which keeps its dtype
                _replace(owner, end, owner.get_parameter(end) if layers else new)
            return [f"{path}.{name}" for name, _ in copied.named_parameters()]
        if getattr(module, "bias", None) is None and hasattr(module, "bias"):
            methods = {name: [p.method for p in own] for name, own in parts.items()}
            with present(module):
                bias = around(self.node, Layer(module, path), methods).bias
            if bias is not None:
                self.biased.add(module)
                _replace(module, "bias", bias.to(Layer(module).like().dtype))
        return [f"{path}.weight", *([f"{path}.bias"] if getattr(module, "bias", None) is not None else [])]

    def _untie(self) -> None:
        """As merging in memory does: of tied weights, those stay one that are still the same afterwards."""
        tied: dict[int, list[str]] = {}
        for name, parameter in self.base.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        for group in tied.values():
            first: tuple[str, Tensor] | None = None
            for name in [n for n in self.owner if n in group] if len(group) > 1 else []:
                path, _, end = name.rpartition(".")
                module, new = self.base.get_submodule(path), self._compute(name)
                if first is not None and torch.equal(first[1], new):
                    setattr(module, end, self.base.get_parameter(first[0]))
                else:
                    _replace(module, end, new)
                    first = first or (name, new)
        self.made.clear()

    def new(self, name: str, old: Tensor) -> Tensor:
        """One parameter or buffer as it is once merged. `old`: as the base has it, on meta where it waits on disk."""
        if name in self.owner:
            return (self.made.pop(name) if name in self.made else self._compute(name)).to(old.dtype)
        if not old.is_meta:
            return old
        path, _, end = name.rpartition(".")
        return value(self.base.get_submodule(path), end)

    def _compute(self, name: str) -> Tensor:
        module, parameter = self.owner[name]
        with present(module, parameter, without=("bias",) if module in self.biased else ()):
            writes = merging.new_values(module, parameter, self.sites[module, parameter], self.node)
        merging.check_finite(writes, self.base, self.node)
        self.made.clear()
        for owner, end, new in writes:
            if new is not None:
                self.made[f"{self.paths[owner]}.{end}"] = new
        if name not in self.made:  # a bias that stays as it is
            path, _, end = name.rpartition(".")
            return value(self.base.get_submodule(path), end)
        return self.made.pop(name)


def _replace(module: nn.Module, name: str, like: Tensor) -> None:
    made = torch.empty(like.shape, dtype=like.dtype, device="meta")
    setattr(module, name, nn.Parameter(made, requires_grad=False))


@contextmanager
def present(module: nn.Module, only: str = "", without: Sequence[str] = ()) -> Iterator[None]:
    """The parameters of a module (or just one) have their values, which wait on disk, inside of the context."""
    absent = {n: p for n, p in module.named_parameters(recurse=False) if p.is_meta and (not only or n == only)}
    for name in absent:
        found = None if name in without else value(module, name)
        if found is None or not found.is_meta:
            module._parameters[name] = None if found is None else nn.Parameter(found, requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(absent)


# ---- files ----------------------------------------------------------------------------------------------------------


def _refuse_joined(base: Any, outlines: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    """What becomes of all weights together must be what becomes of each by itself."""
    apart: dict[str, tuple[Any, ...]] = {}
    for name, outline in outlines.items():
        try:
            pieces = revert_weight_conversion(base, {name: outline})
        except Exception as problem:
            raise _joined(base, name) from problem
        for key, piece in pieces.items():
            if key not in written or written[key].shape != piece.shape:
                raise _joined(base, name)
            apart[key] = tuple(piece.shape)
    if lost := sorted(written.keys() - apart.keys()):
        raise _joined(base, lost[0])


def _joined(base: nn.Module, name: str) -> ValueError:
    return ValueError(
        f"The files of {type(base).__name__} hold {name!r} joined with other weights that the model has apart, which "
        "cannot be written one at a time. Merge in memory: leave --stream out."
    )


@dataclass(frozen=True)
class _File:
    """A safetensors file that is filled in any order."""

    path: Path
    places: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]
    """Key -> where its bytes begin, and what they are."""

    def write(self, key: str, tensor: Tensor) -> None:
        start, dtype, shape = self.places[key]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), f"{key}: {tensor.dtype} {tuple(tensor.shape)}"
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _laid_out(base: Any, where: Path, tensors: Mapping[str, Tensor], max_shard_size: int | str) -> dict[str, _File]:
    """Makes the files with all but the tensors' bytes; says in which each tensor belongs."""
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    found: dict[str, _File] = {}
    for name, keys in split.filename_to_tensors.items():
        found |= dict.fromkeys(keys, _file(where / name, {key: tensors[key] for key in keys}))
    if split.is_sharded:
        told = {"metadata": {"total_parameters": base.num_parameters(), **split.metadata}}
        told["weight_map"] = split.tensor_to_filename
        (where / INDEX).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", "utf-8")
    return found


def _file(path: Path, tensors: Mapping[str, Tensor]) -> _File:
    """In safetensors' own order, the widest numbers first, so that it is the very file that safetensors would write."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        starts[key], end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [starts[key], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (math.ceil(len(text) / 8) * 8 - len(text))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return _File(path, {k: (8 + len(text) + starts[k], t.dtype, tuple(t.shape)) for k, t in tensors.items()})
