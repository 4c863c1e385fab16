"""What the modules of a model are, found from its structure: layers, blocks, attention, heads, what is tied."""

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .bypass import bypassed
from .layer import Layer, kind_of
from .mixture import is_linear, mixtures
from .parameter_layer import layer_at, whole
from .tied import weights

PROJECTIONS = {
    "query": ("q_proj", "q", "query", "q_lin"),
    "key": ("k_proj", "k", "key", "k_lin"),
    "value": ("v_proj", "v", "value", "v_lin"),
    "fused": ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "W_pack", "in_proj"),
}
"""What models call the layers that make queries, keys and values, or all three at once."""

SIBLINGS = (
    *zip(PROJECTIONS["query"], PROJECTIONS["key"], PROJECTIONS["value"], strict=True),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Layers side by side that read the same input, in the order in which they are called."""


@dataclass(frozen=True)
class Place:
    """One module of the base at which an adapter sits."""

    path: str
    module: nn.Module
    reads: tuple[str, nn.Module] | None = None
    """The module whose input the method gets, where that is not `module` itself (a block that has no module)."""
    role: str = ""
    """Which of several alike this is: "encoder", "decoder" or "cross", or what else a method tells apart."""
    parameter: str = ""
    """The name of the parameter that is adapted, where that is no layer's weight; `path` ends in it."""
    expert: int | None = None
    """Which one of fused experts is adapted, (O, I) of that parameter; `path` ends in it: "...down_proj[3]"."""

    @property
    def layer(self) -> Layer:
        """What is adapted, seen as a layer."""
        return layer_at(self)

    @property
    def site(self) -> str:
        """What gates call it: its path; of all experts of a parameter that of the parameter."""
        return whole(self.path) if self.parameter else self.path


def linears(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear layer that can be adapted, in the model's order."""
    skipped = bypassed(base)
    return [(n, m) for n, m in base.named_modules() if is_linear(m) and n not in skipped]


def layers(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every layer of any kind that can be adapted, in the model's order."""
    skipped = bypassed(base)
    return [(p, m) for p, m in base.named_modules() if kind_of(m) is not None and p not in skipped]


def heads(base: Any) -> list[str]:
    """The output head, or the classifier that a task has put on top: never part of "all-linear"."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return [p for p, m in base.named_modules() if (m is head and head is not None) or p in HEADS]


HEADS = ("classifier", "score", "qa_outputs")
"""Names of the heads that a task puts on a pretrained model."""


@dataclass(frozen=True)
class Block:
    """One repeated layer of a model: where its attention and its feed-forward part begin and end."""

    path: str
    attention: tuple[tuple[str, nn.Module], ...]
    """The projection that ends each attention of the block (self-attention, then cross-attention)."""
    feed_forward: tuple[tuple[str, nn.Module], tuple[str, nn.Module]] | None
    """The first and the last linear layer of the feed-forward part; twice the whole module for a mixture of experts."""


def blocks(base: nn.Module) -> list[Block]:
    """The repeated layers: the members of the outermost lists that hold an attention module."""
    found: list[Block] = []
    skipped = bypassed(base)
    inside: set[str] = set()
    for path, module in base.named_modules():
        if path in inside or path.rpartition(".")[0] in inside:
            inside.add(path)
        elif isinstance(module, nn.ModuleList) and path not in skipped:
            here = [b for name, child in module.named_children() if (b := _block(f"{path}.{name}", child))]
            inside |= {block.path for block in here}
            found += here
    return found


def _block(path: str, module: nn.Module) -> Block | None:
    roots: list[str] = []
    for name, part in module.named_modules():
        nested = any(name.startswith(root + ".") for root in roots)
        if name and not nested and "attention" in type(part).__name__.lower() and any(map(is_linear, part.modules())):
            roots.append(name)
    if not roots:
        return None
    inside = [(f"{path}.{n}", m) for n, m in module.named_modules() if is_linear(m)]
    ends = tuple([(p, m) for p, m in inside if p.startswith(f"{path}.{root}.")][-1] for root in roots)
    rest = [(p, m) for p, m in inside if not any(p.startswith(f"{path}.{root}.") for root in roots)]
    mixed = [(f"{path}.{m.path}", m.module) for m in mixtures(module) if m.path]
    beside = [p for p, _ in rest if not any(p.startswith(f"{whole}.") for whole, _ in mixed)]
    if mixed:
        return Block(path, ends, (mixed[0], mixed[0]) if len(mixed) == 1 and not beside else None)
    return Block(path, ends, (rest[0], rest[-1]) if len(rest) > 1 else None)


def norms_around(base: nn.Module, block: Block) -> tuple[tuple[str, nn.Module] | None, tuple[str, nn.Module] | None]:
    """The norm in front of a block's feed-forward part, or the one behind its sum: one of the two, as blocks are built.

    Raises:
        ValueError: the structure does not tell.
    """
    assert block.feed_forward is not None
    path = block.feed_forward[1][0].rpartition(".")[0]
    inside, outside = _norms_in(base, path), _norms_in(base, path.rpartition(".")[0])
    if path != block.path and len(inside) == 1:
        return None, inside[0]
    if path != block.path and not inside and len(outside) in (1, 2) and len(_norms_below(base, block.path)) > 1:
        return outside[-1], None
    raise ValueError(f"Whether {block.path!r} has its norm before or behind its feed-forward part cannot be told.")


def _norms_in(base: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    return [(f"{path}.{n}", m) for n, m in base.get_submodule(path).named_children() if _is_norm(m)]


def _norms_below(base: nn.Module, path: str) -> list[nn.Module]:
    return [m for m in base.get_submodule(path).modules() if _is_norm(m)]


def _is_norm(module: nn.Module) -> bool:
    return (kind := kind_of(module)) is not None and kind.name == "norm"


def query_and_value(base: nn.Module) -> list[str]:
    """The projections that make queries and values, or the one that makes them all, of every attention module."""
    return _projections(base, "query", "value")


def keys_and_values(base: nn.Module) -> list[str]:
    """As `query_and_value`, for keys and values."""
    return _projections(base, "key", "value")


def values(base: nn.Module) -> list[str]:
    """As `query_and_value`, for values."""
    return _projections(base, "value", "value")


def _projections(base: nn.Module, one: str, other: str) -> list[str]:
    named = [(p, p.rpartition(".")[2]) for p, _ in linears(base)]
    split = [p for p, end in named if end in (*PROJECTIONS[one], *PROJECTIONS[other])]
    return split or [p for p, end in named if end in PROJECTIONS["fused"]]


def path_of(base: nn.Module, module: nn.Module) -> str:
    """Where `module` is in `base`."""
    return next(path for path, found in base.named_modules() if found is module)


def with_tied(base: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """These layers, and those that have the very same weight, as a head that is tied to the embedding."""
    every = layers(base)
    weight = weights(base, [m for _, m in (*every, *found)])
    theirs = {id(weight[m]) for _, m in found}
    return [(p, m) for p, m in every if (p, m) in found or id(weight[m]) in theirs]


def word_embeddings(base: Any) -> list[nn.Module]:
    """The embedding of the input and the head, as far as the model has them, with a weight each."""
    found: list[nn.Module] = []
    for end in ("input", "output"):
        try:
            module = getattr(base, f"get_{end}_embeddings", lambda: None)()
        except NotImplementedError:  # what transformers says of a model without tokens
            continue
        if isinstance(module, nn.Module) and isinstance(getattr(module, "weight", None), nn.Parameter):
            found.append(module)
    return found


def norms(base: nn.Module) -> list[str]:
    """The normalisations that have a trained scale."""
    return [p for p, m in layers(base) if (kind := kind_of(m)) is not None and kind.name == "norm"]


@dataclass(frozen=True, kw_only=True)
class Attention(Place):
    """One attention call of the model, as a prefix sees it; its role is "encoder", "decoder" (causal) or "cross"."""

    heads: int
    """H of the keys and values."""
    head_dim: int


def attentions(base: nn.Module) -> list[Attention]:
    """Every attention module that goes through transformers' attention interface, in the model's order."""
    return [a for path, m in base.named_modules() if (a := _attention(base, path, m))]


def without_interface(base: nn.Module) -> list[str]:
    """Classes of attention modules that do not go through the interface (BLOOM's, for one)."""
    return sorted(
        {
            type(m).__name__
            for _, m in base.named_modules()
            if re.search(r"Attention$", type(m).__name__)
            and any(is_linear(c) for c in m.children())
            and not _has_interface(m)
        }
    )


def _has_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = code.co_names if code is not None else ()
    return "ALL_ATTENTION_FUNCTIONS" in names or hasattr(type(module), "_coadapt_has_interface")


def _attention(base: Any, path: str, module: Any) -> Attention | None:
    if not _has_interface(module) or not hasattr(module, "config"):
        return None
    config = module.config
    dim = next(
        (getattr(module, n) for n in ("head_dim", "attention_head_size", "key_value_proj_dim") if hasattr(module, n)),
        None,
    )
    named = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    heads = next((getattr(o, n) for o in (module, config) for n in named if isinstance(getattr(o, n, None), int)), None)
    if heads is None:
        return None
    dim = dim or config.hidden_size // heads
    keys = next((getattr(module, n) for n in PROJECTIONS["key"] if hasattr(module, n)), None)
    if keys is not None and hasattr(keys, "out_features"):
        kv = keys.out_features // dim
    else:
        kv = getattr(module, "num_key_value_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    role = _attention_role(base, path, module)
    return Attention(path, module, role=role, heads=int(kv), head_dim=int(dim))


@functools.cache
def siblings(path: str) -> Sequence[str]:
    """The layers that are given the same input as the one at `path`, as a rule, and after it."""
    parent, _, end = path.rpartition(".")
    after = [f"{parent}.{n}" for names in SIBLINGS if end == names[0] for n in names[1:]]
    return [] if _CROSS.search(path.lower()) else after


_CROSS = re.compile(r"encdecattention|encoder_attn|crossattention|cross_attn")


def _attention_role(base: Any, path: str, module: Any) -> str:
    parts = path.lower()
    if _CROSS.search(parts) or getattr(module, "is_cross_attention", False):
        return "cross"
    if re.search(r"(^|\.)encoder(\.|$)", parts):
        return "encoder" if not getattr(module, "is_causal", False) else "decoder"
    return "decoder" if getattr(module, "is_causal", True) else "encoder"


def with_bias(base: nn.Module) -> list[str]:
    """The layers that have a bias and can be adapted."""
    return [path for path, module in layers(base) if getattr(module, "bias", None) is not None]
