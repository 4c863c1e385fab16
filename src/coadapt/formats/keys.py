"""How an adapter's parameters are called in files: the field's names where it has some, ours where it has none."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, ModuleCopy, Part
from ..core.layer import kind_of
from ..methods.bitfit import BitFit
from ..methods.lora import LoRA, LoraConfig
from ..methods.prefix import Blocks, PrefixTuning, PrefixTuningConfig
from ..methods.prompt import PromptTuning, PromptTuningConfig

ROOT = "base_model.model."
"""Before every module path, as the field writes it."""
VIRTUAL_ROOT = "base_model."
"""The same in files of prompts and prefixes, where the field's model is wrapped once less."""
PROMPT = "prompt_embeddings"
_WRAPPERS = {
    "_orig_mod": "OptimizedModule",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "CheckpointWrapper",
}
"""Names that modules have only because they are wrapped -> the class that wraps."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its key, and how it comes from and goes into the adapter."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def entries(adapter: Adapter, base: nn.Module) -> list[Entry]:
    """What a file for inference holds of `adapter`.

    Keys are built from the paths of the adapter's places, never found by looking into other keys.

    Raises:
        ValueError: two of its tensors would have the same key.
    """
    found = list(_entries(adapter, base))
    if twice := [k for k, n in Counter(e.key for e in found).items() if n > 1]:
        raise ValueError(
            f"Adapter {adapter.name!r} cannot be written: {twice} would stand for several of its tensors. Put the "
            "modules that lie inside of each other into adapters of their own."
        )
    return found


def _entries(adapter: Adapter, base: nn.Module) -> Iterator[Entry]:
    prompts = {p.place.role: p.method for p in adapter.parts if isinstance(p.method, PromptTuning)}
    if prompts:
        yield _prompt(adapter, prompts)
    if isinstance(adapter.shared, Blocks):
        yield _whole(PROMPT, adapter.shared.P)
    elif in_one_tensor(adapter):
        yield _prefix(adapter)
    for part in adapter.parts:
        path = plain_path(base, part.place.path)
        match part.method:
            case PromptTuning():
                continue
            case PrefixTuning() if in_one_tensor(adapter) or isinstance(adapter.shared, Blocks):
                continue
            case PrefixTuning() as method if method.projection is not None:
                yield _computed(method, f"{ROOT}{path}.P")
                yield from _plain(adapter, part, path)
            case BitFit() if isinstance(adapter.config, LoraConfig):
                yield _bias(adapter, part, path)
            case _:
                yield from _plain(adapter, part, path)


def plain_path(base: nn.Module, path: str) -> str:
    """`path` without the names that come from wrapping a module (compiled, sharded, checkpointed)."""
    kept: list[str] = []
    module: Any = base
    for name in path.split(".") if path else ():
        if type(module).__name__ != _WRAPPERS.get(name):
            kept.append(name)
        module = getattr(module, name)
    return ".".join(kept)


# ---- parameters under the path of their module -----------------------------------------------------------------------


def _plain(adapter: Adapter, part: Part, path: str) -> Iterator[Entry]:
    module = part.place.module
    for name, value in part.method.state_dict(keep_vars=True).items():
        shape = tuple(value.shape)
        if isinstance(part.method, LoRA) and name == "B" and (kind := kind_of(module)) and kind.name == "conv":
            shape = (*shape, *[1] * (module.get_parameter("weight").dim() - 2))
        yield _whole(_key(adapter, part, path, name), value, shape)


def _whole(key: str, value: Tensor, shape: tuple[int, ...] | None = None) -> Entry:
    shape = tuple(value.shape) if shape is None else shape
    return Entry(key, shape, lambda: value.detach().reshape(shape), lambda t: _copy(t, value))


def _key(adapter: Adapter, part: Part, path: str, name: str) -> str:
    inside = f"{path}." if path else ""
    match part.method:
        case ModuleCopy():
            virtual = isinstance(adapter.config, PromptTuningConfig | PrefixTuningConfig)
            return (VIRTUAL_ROOT if virtual else ROOT) + inside + name.removeprefix("copy.")
        case LoRA():
            kind = kind_of(part.place.module)
            embedding = kind is not None and kind.name == "embedding"
            return ROOT + inside + (f"lora_embedding_{name}" if embedding else f"lora_{name}.weight")
        case _:
            return ROOT + inside + name


def _bias(adapter: Adapter, part: Part, path: str) -> Entry:
    """The field stores the trained bias, we its change; and the field calls a targeted layer `base_layer`."""
    change: nn.Parameter = part.method.get_parameter("delta")
    own = part.place.module.get_parameter("bias")
    targeted = any(isinstance(p.method, LoRA) and p.place.module is part.place.module for p in adapter.parts)

    def read() -> Tensor:
        return own.detach().to(change) + change.detach()

    def write(tensor: Tensor) -> None:
        _copy(tensor.to(change) - own.detach().to(change), change)

    return Entry(f"{ROOT}{path}.{'base_layer.' if targeted else ''}bias", tuple(change.shape), read, write)


@torch.no_grad()
def _copy(source: Tensor, target: Tensor) -> None:
    if target.is_meta:
        raise ValueError("The base has no weights yet (its device is meta), so adapters cannot be loaded onto it.")
    target.copy_(source.reshape(target.shape))


# ---- prompts: [N, D], for an encoder-decoder [2N, D], the encoder's first --------------------------------------------


def _prompt(adapter: Adapter, methods: Mapping[str, PromptTuning]) -> Entry:
    one = next(iter(methods.values())).P
    roles = ("encoder", "decoder") if adapter.two_stacks else tuple(methods)
    n = len(one)

    def read() -> Tensor:
        return torch.cat([methods[r].P.detach() if r in methods else torch.zeros_like(one.detach()) for r in roles])

    def write(tensor: Tensor) -> None:
        for i, role in enumerate(roles):
            if role in methods:
                _copy(tensor[i * n : (i + 1) * n], methods[role].P)

    return Entry(PROMPT, (n * len(roles), one.shape[1]), read, write)


# ---- prefixes: [N, layers * 2 * H * D], per layer keys, then values --------------------------------------------------


def in_one_tensor(adapter: Adapter) -> bool:
    """Whether the field has a layout for this prefix: joint, and in every layer of a model that is one stack."""
    config = adapter.config
    return isinstance(config, PrefixTuningConfig) and config.prefix_type == "joint" and not adapter.two_stacks


def _prefix(adapter: Adapter) -> Entry:
    methods = [p.method for p in adapter.parts if isinstance(p.method, PrefixTuning)]
    widths = [m.shape[1] * m.shape[2] * m.shape[3] for m in methods]

    def read() -> Tensor:
        return torch.cat([_keys_values(m).flatten(1) for m in methods], dim=1)

    def write(tensor: Tensor) -> None:
        _write_pieces(methods, tensor.split(widths, dim=1))

    return Entry(PROMPT, (methods[0].shape[0], sum(widths)), read, write)


def _computed(method: PrefixTuning, key: str) -> Entry:
    return Entry(key, method.shape, lambda: _keys_values(method), lambda t: _write_pieces([method], [t]))


def _write_pieces(methods: Sequence[PrefixTuning], pieces: Sequence[Tensor]) -> None:
    for method, piece in zip(methods, pieces, strict=True):
        if method.projection is None:
            _copy(piece, method.P)
            continue
        computed = _keys_values(method).float()
        if not torch.allclose(computed, piece.reshape(computed.shape).to(computed), rtol=1e-2, atol=1e-4):
            raise ValueError(
                "The prefix in adapter_model.safetensors is not what the projection in training_state.safetensors "
                "gives: the two files are of different adapters. Without the second, the first loads for inference."
            )


def _keys_values(method: PrefixTuning) -> Tensor:
    """(N, 2, H, D)"""
    keys, values = method.prefix()  # each (H, N, D)
    return torch.stack([keys, values]).permute(2, 0, 1, 3).detach().contiguous()
