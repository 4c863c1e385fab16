"""How an adapter's parameters are called in files: the field's names where it has some, ours where it has none."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TokensConfig, VirtualTokensConfig
from ..core.adapter import Adapter, ModuleCopy, Part
from ..core.bypass import holders
from ..core.layer import kind_of
from ..core.method import FromBase, InputMethod, Progress, Reparametrization, method_for
from ..core.store import value as stored
from ..methods.adalora import AdaLoRA
from ..methods.adamss import AdaMSS
from ..methods.adaption_prompt import AdaptionPrompt
from ..methods.beft import BEFT
from ..methods.bitfit import BitFit
from ..methods.boft import BOFT
from ..methods.cartridge import Cartridge, CartridgeConfig
from ..methods.cpt import CPT
from ..methods.dora import DoRA
from ..methods.glora import GLoRA
from ..methods.hira import HiRA
from ..methods.ia3 import IA3
from ..methods.loha import LoHa
from ..methods.lokr import LoKr
from ..methods.lora import LoRA
from ..methods.lora_bias import LoraBias
from ..methods.monteclora import MonteCLoRA
from ..methods.multitask_prompt import MultitaskPromptTuning
from ..methods.prefix import Blocks, PrefixTuning, PrefixTuningConfig
from ..methods.shadow import Shadow
from ..methods.shadow_stack import Mirror
from ..methods.trainable_tokens import KeptRows, TrainableTokens
from ..methods.vblora import VBLoRA
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


def entries(adapter: Adapter, base: nn.Module, taken: bool = True) -> list[Entry]:
    """What a file for inference holds of `adapter`.

    Keys are built from the paths of the adapter's places, never found by looking into other keys.

    Args:
        taken: with what a start took from the base (A0, B0), as further ranks.

    Raises:
        ValueError: two of its tensors would have the same key.
    """
    found = list(_entries(adapter, base, taken))
    if twice := [k for k, n in Counter(e.key for e in found).items() if n > 1]:
        raise ValueError(
            f"Adapter {adapter.name!r} cannot be written: {twice} would stand for several of its tensors. Put the "
            "modules that lie inside of each other into adapters of their own."
        )
    return found


def _entries(adapter: Adapter, base: nn.Module, taken: bool) -> Iterator[Entry]:
    prompts = {p.place.role: p.method for p in adapter.parts if isinstance(p.method, InputMethod)}
    if prompts:
        yield _prompt(adapter, prompts)
        if isinstance(next(iter(prompts.values())), MultitaskPromptTuning):
            yield _prompt(adapter, prompts, "prefix_task_cols", "U", 1)
    if isinstance(adapter.shared, Blocks):
        yield _whole(PROMPT, adapter.shared.P)
    elif in_one_tensor(adapter):
        yield _prefix(adapter)
    elif adapter.shared is not None and not isinstance(adapter.shared, Reparametrization):
        known = names.SHARED.get(method_for(adapter.config).registered, {})
        for name, value in adapter.shared.state_dict(keep_vars=True).items():
            first, dot, rest = name.partition(".")
            yield _whole(known.get(first, f"{VIRTUAL_ROOT}{first}") + dot + rest, value)
    for parts in _together(adapter):
        each = [list(_of_part(adapter, part, base, taken)) for part in parts]
        place = parts[0].place
        yield from each[0] if place.expert is None else _of_experts(each, plain_path(base, place.site))


def _together(adapter: Adapter) -> list[list[Part]]:
    """Its parts, those at the experts of one parameter together."""
    found: dict[Any, list[Part]] = {}
    for part in adapter.parts:
        key = part if part.place.expert is None else (part.place.site, type(part.method))
        found.setdefault(key, []).append(part)
    return list(found.values())


def _of_experts(each: Sequence[Sequence[Entry]], path: str) -> Iterator[Entry]:
    """What all experts have, in one tensor with the experts first; what differs in shape, for each by its number."""
    by_key: dict[str, dict[int, Entry]] = {}
    for e, found in enumerate(each):
        for entry in found:
            by_key.setdefault(entry.key, {})[e] = entry
    for key, found in by_key.items():
        shapes = {entry.shape for entry in found.values()}
        if len(found) == len(each) and len(shapes) == 1:
            yield _stacked(key, list(found.values()))
            continue
        for e, entry in found.items():
            yield replace(entry, key=f"{ROOT}{path}.{e}.{key.removeprefix(f'{ROOT}{path}.')}")


def _stacked(key: str, found: Sequence[Entry]) -> Entry:
    def write(tensor: Tensor) -> None:
        for entry, own in zip(found, tensor, strict=True):
            entry.write(own)

    return Entry(key, (len(found), *found[0].shape), lambda: torch.stack([entry.read() for entry in found]), write)


def _of_part(adapter: Adapter, part: Part, base: nn.Module, taken: bool) -> Iterator[Entry]:
    path = plain_path(base, part.place.site)
    match part.method:
        case InputMethod():
            return
        case PrefixTuning() if in_one_tensor(adapter) or isinstance(adapter.shared, Blocks):
            return
        case PrefixTuning() as method if method.projection is not None:
            yield _computed(method, f"{ROOT}{path}.P")
            yield from _plain(adapter, part, path)
        case LoraBias() as method:
            yield _whole(f"{ROOT}{path}.lora_B.bias", method.delta)
        case BitFit() if not issubclass(method_for(adapter.config), BitFit):
            layers = {p.place.path for p in adapter.parts if isinstance(p.method, method_for(adapter.config))}
            inside = "base_layer." if part.place.path in layers else ""
            yield _bias(part, f"{ROOT}{path}.{inside}bias")
        case GLoRA() as method:
            yield from _plain(adapter, part, path)
            yield from (_zeros(f"{ROOT}{path}.glora_{n}.zeros", shape) for n, shape in method.absent.items())
        case Shadow() as method:
            yield from _plain(adapter, part, path)
            yield from (_zeros(_key(adapter, part, path, n), shape) for n, shape in method.absent.items())
        case MonteCLoRA() as method:
            yield from _plain(adapter, part, path, taken)
            yield from _last_drawn(method, f"{ROOT}{path}.lora_monteclora_sampler.")
        case KeptRows():
            yield from _kept(adapter, part, base)
        case TrainableTokens() if isinstance(adapter.config, TokensConfig):
            yield from _tokens_beside(adapter, part, plain_path(base, _holder(part, base) or part.place.path))
        case TrainableTokens() as method if holder := _holder(part, base):
            yield _whole(f"{ROOT}{plain_path(base, holder)}.trainable_tokens_delta", method.rows)
            yield from _plain(adapter, part, path)
        case LoRA() as method if part.place.parameter and type(method) is LoRA:
            yield from _of_parameter(adapter, part, method, path.rpartition(".")[0], taken)
        case LoRA() as method if method.turned:
            yield from _turned(adapter, part, method, path, taken)
        case VBLoRA() as method if method.best_only:
            for name in ("zA", "zB"):
                yield from _chosen(method, name, _key(adapter, part, path, name))
        case AdaMSS() as method:
            yield from _grouped(method, f"{ROOT}{path}.")
        case _:
            yield from _plain(adapter, part, path, taken)


def shared_keys(adapter: Adapter) -> Mapping[str, str]:
    """The keys of what the sites of an adapter share, by their last parts, as far as the field has names for it."""
    keys = names.SHARED.get(method_for(adapter.config).registered, {}).values()
    return {key.rpartition(".")[2]: key for key in keys}


def is_unread(key: str, adapter: Adapter) -> bool:
    """Whether nothing reads a tensor of the field's: SHADOW's table of embeddings beside one that it shares."""
    absent = adapter.shared.without if isinstance(adapter.shared, Mirror) else None
    return absent is not None and key == f"{names.SHARED['SHADOW']['backbone']}.{absent}.weight"


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


def _plain(adapter: Adapter, part: Part, path: str, taken: bool = True) -> Iterator[Entry]:
    inside = [f"{n}." for n, m in part.method.named_modules() if isinstance(m, Progress | FromBase)]
    factors = next((m for m in part.method.modules() if isinstance(m, LoRA)), None)
    for name, value in part.method.state_dict(keep_vars=True).items():
        end = name.rpartition(".")[2]
        if name.startswith(tuple(inside)) or end in part.method.left_out or (factors and end in ("A0", "B0")):
            continue
        entry = _whole(_key(adapter, part, path, name), value, _shape(part, name, value))
        yield entry if factors is None or not taken else _with_taken(entry, factors, end)


def _with_taken(entry: Entry, method: LoRA, name: str) -> Entry:
    """`entry` of A or B, with A0 or -B0 as further ranks where a start took them: a plain LoRA that says the same."""
    if method.A0 is None or method.B0 is None or not method.keeps_taken or name not in ("A", "B"):
        return entry
    own, taken, sign = (method.A, method.A0, 1) if name == "A" else (method.B, method.B0, -1)
    dim = method.B.dim() - (2 if name == "A" else 1)
    ranks = [own.shape[dim], taken.shape[dim]]
    shape = (*entry.shape[:dim], sum(ranks), *entry.shape[dim + 1 :])

    def write(tensor: Tensor) -> None:
        trained, frozen = tensor.split(ranks, dim)
        entry.write(trained)
        _copy(sign * frozen, taken)

    return Entry(entry.key, shape, lambda: torch.cat([own.detach(), sign * taken], dim).reshape(shape), write)


def _shape(part: Part, name: str, value: Tensor) -> tuple[int, ...]:
    """As the field stores it: with a dim of 1 for each that the parameter is broadcast over."""
    kind = kind_of(part.place.module)
    convolved = part.place.module.get_parameter("weight").dim() - 2 if kind is not None and kind.name == "conv" else 0
    match part.method, name:
        case AdaptionPrompt(), _:
            return (1, *value.shape)
        case ((LoRA() | DoRA() | HiRA()), ("B" | "change.B")):
            return (*value.shape, *[1] * convolved)
        case (DoRA(), "m") if convolved:
            return (1, len(value), *[1] * convolved)
        case ((LoHa() | LoKr()), ("T" | "T1" | "T2")) if convolved == 1:
            return (*value.shape, 1)
        case BOFT(), "s":
            return (1, len(value)) if convolved else (len(value), 1)
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
    tables = [names.SITES]
    if (kind := kind_of(part.place.module)) is not None and kind.name == "embedding":
        tables.insert(0, names.EMBEDDED)
    head, dot, rest = name.partition(".")
    for known in (table.get(part.method.registered, {}) for table in tables):
        if name in known:
            return ROOT + inside + known[name]
        if head in known:
            return ROOT + inside + known[head] + dot + rest
    return ROOT + inside + name


def _turned(adapter: Adapter, part: Part, method: LoRA, path: str, taken: bool) -> Iterator[Entry]:
    """A layer that is tied to one with the transposed weight: the factors there, as the field has them here."""
    for name, other in (("A", "B"), ("B", "A")):
        whole = _whole("", method.get_parameter(other))
        there = _with_taken(whole, method, other) if taken else whole
        key = _key(adapter, part, path, name)

        def write(tensor: Tensor, key: str = key, there: Entry = there) -> None:
            now = there.read()
            if not torch.equal(now, tensor.mT.to(now)):
                raise ValueError(
                    f"{key} is not what the layer has that it is tied to (ensure_weight_tying): peft's parameters come "
                    "apart when its model is moved. Put ensure_weight_tying=false into adapter_config.json."
                )

        yield Entry(key, there.shape[::-1], lambda there=there: there.read().mT.contiguous(), write)


def _of_parameter(adapter: Adapter, part: Part, method: LoRA, path: str, taken: bool) -> Iterator[Entry]:
    """The field keeps all experts' factors in two matrices, A [E R, I] and B [O, R E], each expert's ranks apart in B.

    It wraps a module once for each of its parameters, so that the last one is outermost.
    """
    here = [p.place.parameter for p in adapter.parts if p.place.module is part.place.module and p.place.parameter]
    inside = "base_layer." * (len(here) - 1 - here.index(part.place.parameter))
    a, b = _whole("", method.A), _whole("", method.B)
    if taken:
        a, b = _with_taken(a, method, "A"), _with_taken(b, method, "B")
    rank, columns = a.shape[-2:]
    yield Entry(
        f"{ROOT}{path}.{inside}lora_A.weight",
        (math.prod(a.shape) // columns, columns),
        lambda: a.read().reshape(-1, columns),
        lambda t: a.write(t.view(a.shape)),
    )
    key = f"{ROOT}{path}.{inside}lora_B.weight"
    if len(b.shape) == 2:
        yield Entry(key, b.shape, b.read, b.write)
        return
    experts, out, _ = b.shape
    yield Entry(
        key,
        (out, rank * experts),
        lambda: b.read().permute(1, 2, 0).reshape(out, -1),
        lambda t: b.write(t.view(out, rank, experts).permute(2, 0, 1)),
    )


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


def _chosen(method: VBLoRA, name: str, key: str) -> Iterator[Entry]:
    """Which vectors each piece has, in as few bits as there are vectors, and the weights of all but the last."""
    logits = method.get_parameter(name)
    *pieces, count = logits.shape
    k = method.topk
    small = torch.uint8 if count < 2**8 else torch.int16 if count < 2**15 else torch.int32
    got: dict[str, Tensor] = {}

    def write(what: str, tensor: Tensor) -> None:
        _refuse_meta(logits)
        got[what] = tensor
        if len(got) == 2:
            method.settle(logits, got["indices"], got["weights"])

    def indices() -> Tensor:
        return logits.detach().topk(k, dim=-1).indices.to(small)

    def weights() -> Tensor:
        return logits.detach().topk(k, dim=-1).values.softmax(-1)[..., :-1].contiguous()

    yield Entry(f"{key}_topk_indices", (*pieces, k), indices, lambda t: write("indices", t))
    yield Entry(f"{key}_topk_weights", (*pieces, k - 1), weights, lambda t: write("weights", t))


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


def _holder(part: Part, base: nn.Module) -> str | None:
    """The module that holds the weight of a part's, and of others, where that is the first of them: T5's `shared`."""
    return next((path for path, tied in holders(base).items() if part.place.path == tied[0]), None)


def _tokens_beside(adapter: Adapter, part: Part, path: str) -> Iterator[Entry]:
    """Rows of tokens in a LoRA's file; those of a tied head are the embedding's."""
    rows = part.method.get_parameter("rows")
    first = next(p for p in adapter.parts if isinstance(p.method, TrainableTokens) and p.method.rows is rows)
    if first is part:
        yield _whole(f"{ROOT}{path}.token_adapter.trainable_tokens_delta", rows)


def _zeros(key: str, shape: tuple[int, ...]) -> Entry:
    """The field writes zeros for what is not there."""
    return Entry(key, shape, lambda: torch.zeros(shape), lambda _: None)


def _last_drawn(method: MonteCLoRA, inside: str) -> Iterator[Entry]:
    """The field stores what its last training call drew, of which nobody makes use; we write what it starts with."""
    rank, n = len(method.v), len(method.c)
    yield Entry(f"{inside}gaussian_var_prior", (rank, rank), lambda: torch.eye(rank), lambda _: None)
    yield Entry(f"{inside}expert_weights", (n,), lambda: torch.ones(n) / n, lambda _: None)


def _bias(part: Part, key: str) -> Entry:
    """The field stores the trained bias, we its change."""
    change = part.method.get_parameter("delta")
    module = part.place.module

    def read() -> Tensor:
        return stored(module, "bias").to(change) + change.detach()

    def write(tensor: Tensor) -> None:
        _copy(tensor.to(change) - stored(module, "bias").to(change), change)

    return Entry(key, tuple(change.shape), read, write)


def present(key: str) -> str:
    """A key of an older file, as it is now."""
    if key.startswith(ROOT + VIRTUAL_ROOT):  # transformers puts ROOT before every key
        key = key.removeprefix(ROOT)
    path, dot, end = key.rpartition(".")
    return f"{path}{dot}{names.OLDER.get(end, end)}"


def holds_biases(adapter: Adapter) -> bool:
    """Whether its file holds the base's biases with their changes, so that the base's own must be in place."""
    beside = not issubclass(method_for(adapter.config), BitFit)
    return beside and any(isinstance(p.method, BitFit) for p in adapter.parts)


@torch.no_grad()
def _copy(source: Tensor, target: Tensor) -> None:
    _refuse_meta(target)
    target.copy_(source.reshape(target.shape))


def _refuse_meta(target: Tensor) -> None:
    if target.is_meta:
        raise ValueError("The base has no weights yet (its device is meta), so adapters cannot be loaded onto it.")


# ---- prompts: [N, D], for an encoder-decoder [2N, D], the encoder's first --------------------------------------------


def _prompt(
    adapter: Adapter, methods: Mapping[str, InputMethod], key: str = PROMPT, name: str = "P", dim: int = 0
) -> Entry:
    """The parameter `name` of all stacks in one tensor, along `dim`; the tokens, where a network makes them."""

    def own(role: str) -> Tensor:
        found = getattr(methods[role], name, None)
        return (methods[role].prompt() if found is None else found).detach()

    one = own(next(iter(methods)))
    roles = ("encoder", "decoder") if adapter.two_stacks else tuple(methods)
    n = one.shape[dim]

    def read() -> Tensor:
        return torch.cat([own(role) if role in methods else torch.zeros_like(one) for role in roles], dim)

    def write(tensor: Tensor) -> None:
        for i, role in enumerate(roles):
            if role in methods:
                _copy_or_compare(tensor.narrow(dim, i * n, n), methods[role], own(role), name)

    shape = (*one.shape[:dim], n * len(roles), *one.shape[dim + 1 :])
    return Entry(key, shape, read, write)


def _copy_or_compare(stored: Tensor, method: nn.Module, made: Tensor, name: str = "P") -> None:
    """Where a network makes the virtual tokens, the file's must be those that it makes."""
    parameter = getattr(method, name, None)
    if isinstance(method, Cartridge | CPT):
        _refuse_meta(made)
        with torch.no_grad():
            return method.start_at(stored.reshape(made.shape))
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
    if isinstance(config, CartridgeConfig):
        return not adapter.two_stacks
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
