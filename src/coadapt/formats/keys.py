"""How an adapter's parameters are called in files: the field's names where it has some, ours where it has none."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TokensConfig, VirtualTokensConfig
from ..core.adapter import Adapter, ModuleCopy, Part
from ..core.layer import kind_of
from ..core.method import FromBase, InputMethod, Progress, Reparametrization, method_for
from ..methods.adalora import AdaLoRA
from ..methods.adamss import AdaMSS
from ..methods.adaption_prompt import AdaptionPrompt
from ..methods.beft import BEFT
from ..methods.bitfit import BitFit
from ..methods.boft import BOFT
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
from ..methods.prefix import Blocks, PrefixTuning
from ..methods.shadow import Shadow
from ..methods.shadow_stack import Mirror
from ..methods.trainable_tokens import KeptRows, TrainableTokens
from ..methods.vblora import VBLoRA
from . import names
from .entry import Entry, whole, zeros
from .layouts import bias, chosen, grouped, holder, kept, last_drawn, of_parameter, tokens_beside, turned, with_taken
from .virtual import PROMPT, computed, in_one_tensor, prefix, prompt
from .vocabulary import ROOT

VIRTUAL_ROOT = "base_model."
"""What `ROOT` is in files of prompts and prefixes, where the field's model is wrapped once less."""
_WRAPPERS = {
    "_orig_mod": "OptimizedModule",
    "module": "DistributedDataParallel",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "CheckpointWrapper",
}
"""Names that modules have only because they are wrapped -> the class that wraps."""


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
        yield prompt(adapter, prompts)
        if isinstance(next(iter(prompts.values())), MultitaskPromptTuning):
            yield prompt(adapter, prompts, "prefix_task_cols", "U", 1)
    if isinstance(adapter.shared, Blocks):
        yield whole(PROMPT, adapter.shared.P)
    elif in_one_tensor(adapter):
        yield prefix(adapter)
    elif adapter.shared is not None and not isinstance(adapter.shared, Reparametrization):
        known = names.SHARED.get(method_for(adapter.config).registered, {})
        for name, value in adapter.shared.state_dict(keep_vars=True).items():
            first, dot, rest = name.partition(".")
            yield whole(known.get(first, f"{VIRTUAL_ROOT}{first}") + dot + rest, value)
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
            yield computed(method, f"{ROOT}{path}.P")
            yield from _plain(adapter, part, path)
        case LoraBias() as method:
            yield whole(f"{ROOT}{path}.lora_B.bias", method.delta)
        case BitFit() if not issubclass(method_for(adapter.config), BitFit):
            layers = {p.place.path for p in adapter.parts if isinstance(p.method, method_for(adapter.config))}
            inside = "base_layer." if part.place.path in layers else ""
            yield bias(part, f"{ROOT}{path}.{inside}bias")
        case GLoRA() as method:
            yield from _plain(adapter, part, path)
            yield from (zeros(f"{ROOT}{path}.glora_{n}.zeros", shape) for n, shape in method.absent.items())
        case Shadow() as method:
            yield from _plain(adapter, part, path)
            yield from (zeros(_key(adapter, part, path, n), shape) for n, shape in method.absent.items())
        case MonteCLoRA() as method:
            yield from _plain(adapter, part, path, taken)
            yield from last_drawn(method, f"{ROOT}{path}.lora_monteclora_sampler.")
        case KeptRows():
            yield from kept(adapter, part, base)
        case TrainableTokens() if isinstance(adapter.config, TokensConfig):
            yield from tokens_beside(adapter, part, plain_path(base, holder(part, base) or part.place.path))
        case TrainableTokens() as method if tied := holder(part, base):
            yield whole(f"{ROOT}{plain_path(base, tied)}.trainable_tokens_delta", method.rows)
            yield from _plain(adapter, part, path)
        case LoRA() as method if part.place.parameter and type(method) is LoRA:
            yield from of_parameter(adapter, part, method, path.rpartition(".")[0], taken)
        case LoRA() as method if method.turned:
            yield from turned(method, {n: _key(adapter, part, path, n) for n in "AB"}, taken)
        case VBLoRA() as method if method.best_only:
            for name in ("zA", "zB"):
                yield from chosen(method, name, _key(adapter, part, path, name))
        case AdaMSS() as method:
            yield from grouped(method, f"{ROOT}{path}.")
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
        entry = whole(_key(adapter, part, path, name), value, _shape(part, name, value))
        yield entry if factors is None or not taken else with_taken(entry, factors, end)


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
