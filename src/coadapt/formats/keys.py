"""How an adapter's parameters are called in files: the field's names where it has some, ours where it has none."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import VirtualTokensConfig
from ..core.adapter import Adapter, ModuleCopy, Part
from ..core.layer import kind_of
from ..core.method import FromBase, Progress, Reparametrization, method_for
from ..methods.adalora import AdaLoRA
from ..methods.adamss import AdaMSS
from ..methods.beft import BEFT
from ..methods.bitfit import BitFit
from ..methods.dora import DoRA
from ..methods.ia3 import IA3
from ..methods.lora import LoRA, LoraConfig
from ..methods.prefix import Blocks, PrefixTuning, PrefixTuningConfig
from ..methods.prompt import VirtualTokens
from ..methods.trainable_tokens import KeptRows, TrainableTokens
from . import names
from .vocabulary import ROOT, embeddings

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
    prompts = {p.place.role: p.method for p in adapter.parts if isinstance(p.method, VirtualTokens)}
    if prompts:
        yield _prompt(adapter, prompts)
    if isinstance(adapter.shared, Blocks):
        yield _whole(PROMPT, adapter.shared.P)
    elif in_one_tensor(adapter):
        yield _prefix(adapter)
    elif adapter.shared is not None and not isinstance(adapter.shared, Reparametrization):
        known = names.SHARED.get(method_for(adapter.config).registered, {})
        for name, value in adapter.shared.state_dict(keep_vars=True).items():
            yield _whole(known.get(name, f"{VIRTUAL_ROOT}{name}"), value)
    for part in adapter.parts:
        path = plain_path(base, part.place.path)
        match part.method:
            case VirtualTokens():
                continue
            case PrefixTuning() if in_one_tensor(adapter) or isinstance(adapter.shared, Blocks):
                continue
            case PrefixTuning() as method if method.projection is not None:
                yield _computed(method, f"{ROOT}{path}.P")
                yield from _plain(adapter, part, path)
            case BitFit() if isinstance(adapter.config, LoraConfig):
                layers = {p.place.path for p in adapter.parts if isinstance(p.method, LoRA | DoRA)}
                inside = "base_layer." if part.place.path in layers else ""
                yield _bias(part, f"{ROOT}{path}.{inside}bias")
            case KeptRows():
                yield from _kept(adapter, part, base)
            case TrainableTokens() if isinstance(adapter.config, LoraConfig):
                yield from _tokens_beside(adapter, part, path)
            case LoRA() as method if part.place.parameter:
                yield from _of_parameter(adapter, part, method, path.rpartition(".")[0])
            case AdaMSS() as method:
                yield from _grouped(method, f"{ROOT}{path}.")
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
    inside = [f"{n}." for n, m in part.method.named_modules() if isinstance(m, Progress | FromBase)]
    for name, value in part.method.state_dict(keep_vars=True).items():
        if name.startswith(tuple(inside)):
            continue
        yield _whole(_key(adapter, part, path, name), value, _shape(part, name, value))


def _shape(part: Part, name: str, value: Tensor) -> tuple[int, ...]:
    """As the field stores it: with a dim of 1 for each that the parameter is broadcast over."""
    kind = kind_of(part.place.module)
    convolved = part.place.module.get_parameter("weight").dim() - 2 if kind is not None and kind.name == "conv" else 0
    match part.method, name:
        case ((LoRA() | DoRA()), ("B" | "change.B")):
            return (*value.shape, *[1] * convolved)
        case (DoRA(), "m") if convolved:
            return (1, len(value), *[1] * convolved)
        case IA3() as method, "l" if convolved or method.on_input:
            return (1, len(value), *[1] * convolved)
        case AdaLoRA(), "A":
            return tuple(value.flatten(1).shape)
        case BEFT(), "delta":
            return (1, len(value))
        case IA3(), "l":
            return (len(value), 1)
        case _:
            return tuple(value.shape)


def _whole(key: str, value: Tensor, shape: tuple[int, ...] | None = None) -> Entry:
    shape = tuple(value.shape) if shape is None else shape
    return Entry(key, shape, lambda: value.detach().reshape(shape), lambda t: _copy(t, value))


def _key(adapter: Adapter, part: Part, path: str, name: str) -> str:
    inside = f"{path}." if path else ""
    if isinstance(part.method, ModuleCopy):
        virtual = isinstance(adapter.config, VirtualTokensConfig)
        return (VIRTUAL_ROOT if virtual else ROOT) + inside + name.removeprefix("copy.")
    known = names.SITES.get(part.method.registered, {}).get(name, name)
    kind = kind_of(part.place.module)
    if kind is not None and kind.name == "embedding" and known.endswith(".weight"):
        known = known.replace("lora_", "lora_embedding_").removesuffix(".weight")
    return ROOT + inside + known


def _of_parameter(adapter: Adapter, part: Part, method: LoRA, path: str) -> Iterator[Entry]:
    """The field keeps all experts' factors in two matrices, A [E R, I] and B [O, R E], each expert's ranks apart in B.

    It wraps a module once for each of its parameters, so that the last one is outermost.
    """
    here = [p.place.parameter for p in adapter.parts if p.place.module is part.place.module and p.place.parameter]
    inside = "base_layer." * (len(here) - 1 - here.index(part.place.parameter))
    a, b = method.A, method.B
    yield _whole(f"{ROOT}{path}.{inside}lora_A.weight", a, (a.numel() // a.shape[-1], a.shape[-1]))
    key = f"{ROOT}{path}.{inside}lora_B.weight"
    if b.dim() == 2:
        yield _whole(key, b)
        return
    experts, out, rank = b.shape

    def write(tensor: Tensor) -> None:
        _copy(tensor.view(out, rank, experts).permute(2, 0, 1), b)

    yield Entry(key, (out, rank * experts), lambda: b.detach().permute(1, 2, 0).reshape(out, -1), write)


def _grouped(method: AdaMSS, inside: str) -> Iterator[Entry]:
    """The field has a matrix for each group of outputs; those that a group's rank leaves out are not there."""
    yield _whole(f"{inside}adamss_newB", method.V)
    for k, (rows, rank) in enumerate(method.subspaces()):
        yield _whole(f"{inside}adamss_A.{k}", method.A[k, :rank])

        def write(tensor: Tensor, rows: Tensor = rows, rank: int = rank) -> None:
            with torch.no_grad():
                method.B[rows, :rank] = tensor.to(method.B)

        shape = len(rows), rank
        yield Entry(f"{inside}adamss_B.{k}", shape, lambda r=rows, n=rank: method.B.detach()[r, :n].clone(), write)


def _kept(adapter: Adapter, part: Part, base: nn.Module) -> Iterator[Entry]:
    """The whole embedding, as the field writes it where the vocabulary was resized; of tied ones the first."""
    for path, module in embeddings(base).items():
        weight = module.get_parameter("weight")
        if part.place.module.weight is weight and next(
            p for p in adapter.parts if isinstance(p.method, KeptRows) and p.place.module.weight is weight
        ) is part:  # fmt: skip
            rows: Any = part.method
            whole = weight.detach().index_copy(0, rows.ids.to(weight.device), rows.rows.to(weight.dtype))
            yield Entry(f"{ROOT}{path}.weight", tuple(weight.shape), lambda whole=whole: whole, lambda _: None)


def _tokens_beside(adapter: Adapter, part: Part, path: str) -> Iterator[Entry]:
    """Rows of tokens in a LoRA's file; those of a tied head are the embedding's."""
    rows = part.method.get_parameter("rows")
    first = next(p for p in adapter.parts if isinstance(p.method, TrainableTokens) and p.method.rows is rows)
    if first is part:
        yield _whole(f"{ROOT}{path}.token_adapter.trainable_tokens_delta", rows)


def _bias(part: Part, key: str) -> Entry:
    """The field stores the trained bias, we its change."""
    change = part.method.get_parameter("delta")
    own = part.place.module.get_parameter("bias")

    def read() -> Tensor:
        return own.detach().to(change) + change.detach()

    def write(tensor: Tensor) -> None:
        _copy(tensor.to(change) - own.detach().to(change), change)

    return Entry(key, tuple(change.shape), read, write)


def holds_biases(adapter: Adapter) -> bool:
    """Whether its file holds the base's biases with their changes, so that the base's own must be in place."""
    return isinstance(adapter.config, LoraConfig) and any(isinstance(p.method, BitFit) for p in adapter.parts)


@torch.no_grad()
def _copy(source: Tensor, target: Tensor) -> None:
    if target.is_meta:
        raise ValueError("The base has no weights yet (its device is meta), so adapters cannot be loaded onto it.")
    target.copy_(source.reshape(target.shape))


# ---- prompts: [N, D], for an encoder-decoder [2N, D], the encoder's first --------------------------------------------


def _prompt(adapter: Adapter, methods: Mapping[str, VirtualTokens]) -> Entry:
    one = next(iter(methods.values())).prompt().detach()
    roles = ("encoder", "decoder") if adapter.two_stacks else tuple(methods)
    n = len(one)

    def read() -> Tensor:
        made = {role: method.prompt().detach() for role, method in methods.items()}
        return torch.cat([made.get(role, torch.zeros_like(one)) for role in roles])

    def write(tensor: Tensor) -> None:
        for i, role in enumerate(roles):
            if role in methods:
                _copy_or_compare(tensor[i * n : (i + 1) * n], methods[role], methods[role].prompt())

    return Entry(PROMPT, (n * len(roles), one.shape[1]), read, write)


def _copy_or_compare(stored: Tensor, method: nn.Module, made: Tensor) -> None:
    """Where a network makes the virtual tokens, the file's must be those that it makes."""
    parameter = getattr(method, "P", None)
    if parameter is not None:
        return _copy(stored, parameter)
    found = made.detach().float()
    if not torch.allclose(found, stored.reshape(found.shape).to(found), rtol=1e-2, atol=1e-4):
        raise ValueError(
            "The virtual tokens in adapter_model.safetensors are not what the network in training_state.safetensors "
            "makes: the two files are of different adapters. Without the second, the first loads for inference."
        )
    return None


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
        _copy_or_compare(piece, method, _keys_values(method))


def _keys_values(method: PrefixTuning) -> Tensor:
    """(N, 2, H, D)"""
    keys, values = method.prefix()  # each (H, N, D)
    return torch.stack([keys, values]).permute(2, 0, 1, 3).detach().contiguous()
