"""What hypothesis draws: configurations of any method, gates, compositions, batches; and what of that must be refused.

A new kind of gate is one more row of GATES, or of ROUTERS if it chooses those of all children of a Sum; where it
belongs to one batch, `of_row` says what one row sees of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from coadapt import (
    Arrow,
    BottleneckConfig,
    CompacterConfig,
    Fusion,
    Learned,
    LoraConfig,
    PeftModel,
    PooledRouter,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    Seq,
    Sum,
    TaskRouter,
    TokenRouter,
)
from coadapt.config import PeftConfig
from coadapt.core.backbone import counts_alone
from coadapt.core.composition import routers
from coadapt.core.gates import Routed, is_zero
from coadapt.core.layer import Around, Layer
from coadapt.core.method import AttentionMethod, InputMethod, WeightMethod
from coadapt.core.router import Router
from laws.setting import EVERY, config_of, fits
from models import ids

DEPTH = 4
TWO_STACKS = ("t5", "bart", "whisper")
NO_TEXT = ("vit", "whisper", "plain", "conv")
"""Their inputs have no padding."""
ABSOLUTE = ("bert", "bart")
"""Their own positions count padding on the left."""
COUNTED = ("llama", "gpt2", "gemma2", "gemma3", "qwen2", "qwen3", "mixtral")
"""They count it too, unless they are told positions."""

# ---- adapters --------------------------------------------------------------------------------------------------------


def every(model: str) -> dict[str, PeftConfig]:
    """One adapter for each case of tests/cases.py that fits the model, and second ones of other sizes."""
    found = {case: config_of(case, model) for case in EVERY if fits(case, model)}
    more: dict[str, PeftConfig] = {}
    if "prompt" in found:
        more["prompt2"] = PromptTuningConfig(num_virtual_tokens=2)
    if "prompt" in found and model in TWO_STACKS:
        sites = ["decoder"] if model == "whisper" else ["encoder", "decoder"]
        more["prompt-both"] = PromptTuningConfig(num_virtual_tokens=3, prompt_sites=sites)
    if "prefix" in found:
        more["prefix2"] = PrefixTuningConfig(num_virtual_tokens=2, position_offset=0)
    more["lora2"] = replace(config_of("lora", model), r=2, lora_alpha=1)  # type: ignore[type-var]
    return {**found, **more}


def configurations(model: str) -> st.SearchStrategy[PeftConfig]:
    """Any method, with options of its own: those of its case, and others drawn."""
    return st.sampled_from([case for case in EVERY if fits(case, model)]).flatmap(
        lambda case: _varied(config_of(case, model))
    )


def _varied(config: PeftConfig) -> st.SearchStrategy[PeftConfig]:
    changes: dict[str, st.SearchStrategy[Any]] = {}
    match config:
        case LoraConfig(use_bdlora=None):
            changes = {"r": st.integers(1, 5), "lora_alpha": st.integers(1, 9), "use_rslora": st.booleans()}
        case CompacterConfig():
            changes = {"phm_rank": st.integers(1, 2)} if config.factorized_phm_W else {}
        case BottleneckConfig():
            changes = {
                "bottleneck_size": st.integers(1, 5),
                "non_linearity": st.sampled_from(["relu", "gelu", "tanh"]),
                "scaling": st.sampled_from([0.5, 4.0, "learned"]),
                "adapter_layer_norm": st.sampled_from([None, "before", "after"]),
            }
        case PromptTuningConfig():
            changes = {"num_virtual_tokens": st.integers(1, 4)}
        case PromptEncoderConfig():
            changes = {"num_virtual_tokens": st.integers(1, 4), "encoder_hidden_size": st.integers(1, 8)}
        case PrefixTuningConfig():
            changes = {"num_virtual_tokens": st.integers(1, 4)}
        case _:
            pass
    return st.fixed_dictionaries(changes).map(lambda given: replace(config, **given))


# ---- gates and compositions ------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.sampled_from([1.0, 0.0, -1.0, 0.5, 2.0]), st.floats(-2, 2, width=32))
STARTS = st.floats(0.125, 2, width=32)
GATES: dict[str, Callable[[int], st.SearchStrategy[Any]]] = {
    "number": lambda rows: NUMBERS,
    "learned": lambda rows: STARTS.map(Learned),
    "learned per layer": lambda rows: STARTS.map(lambda start: Learned(start, per_layer=True)),
    "per row": lambda rows: st.lists(NUMBERS, min_size=rows, max_size=rows).map(torch.tensor),
}
"""Kinds of gates: rows of the batch -> what stands before one child."""

CHOICE: dict[str, st.SearchStrategy[Any]] = {
    "activation": st.sampled_from(["softmax", "sigmoid"]),
    "top_k": st.sampled_from([None, 1]),
    "temperature": st.sampled_from([1.0, 0.5]),
}
ROUTERS: dict[str, Callable[[], st.SearchStrategy[Router]]] = {
    "token": lambda: st.builds(TokenRouter, hidden=st.sampled_from([None, 3]), **CHOICE),
    "pooled": lambda: st.builds(PooledRouter, **CHOICE),
    "task": lambda: st.builds(TaskRouter, num_tasks=st.just(TASKS), **CHOICE),
    "arrow": lambda: st.builds(Arrow, top_k=CHOICE["top_k"], temperature=CHOICE["temperature"]),
    "fusion": lambda: st.builds(Fusion, dim=st.sampled_from([None, 3]), values=st.booleans()),
}
"""Kinds of routers: what chooses the gates of all children of a Sum."""
TASKS = 2
LASTING = ("number", "learned", "learned per layer", *ROUTERS)
"""Gates that can be kept in a file."""
EVERY_GATE = (*LASTING, "per row")


def of_row(node: Any, b: int) -> Any:
    """A composition as row b of its batch sees it, alone."""
    if isinstance(node, str):
        return node
    children = [of_row(c, b) for c in node.children]
    if isinstance(node, Seq):
        return Seq(*children)
    return Sum(*children, weights=node.router or [w[b : b + 1] if isinstance(w, Tensor) else w for w in node.weights])


def tasks(nodes: Sequence[Any], rows: Sequence[int]) -> dict[str, Any]:
    """What a call is told where some router goes by the task: that of these rows."""
    asked = any(isinstance(r, TaskRouter) for node in nodes if node is not None for r, _ in routers(node))
    return {"task_ids": [b % TASKS for b in rows]} if asked else {}


def nodes(
    names: st.SearchStrategy[str],
    gates: st.SearchStrategy[Any],
    chosen: st.SearchStrategy[Router] | None,
    depth: int = DEPTH,
) -> st.SearchStrategy[Any]:
    """Names, Seqs and Sums of up to three children, at most `depth` deep; a name more than once, too."""
    if not depth:
        return names
    inner = nodes(names, gates, chosen, depth - 1)
    most = 3 if depth > DEPTH - 2 else 2
    found = [
        names,
        st.lists(inner, max_size=most).map(lambda c: Seq(*c)),
        st.lists(st.tuples(inner, gates), max_size=most).map(
            lambda pairs: Sum(*[c for c, _ in pairs], weights=[w for _, w in pairs])
        ),
    ]
    if chosen is not None:
        several = st.lists(inner, min_size=2, max_size=most)
        found.append(st.tuples(several, chosen).map(lambda pair: Sum(*pair[0], weights=pair[1])))
    return st.one_of(found)


def compositions(names: Mapping[str, Any], rows: int, kinds: Sequence[str] = EVERY_GATE) -> st.SearchStrategy[Any]:
    """Compositions of these adapters, with gates of these kinds. Few names at a time, so that they meet."""
    gates = st.one_of([GATES[kind](rows) for kind in kinds if kind in GATES])
    chosen = [ROUTERS[kind]() for kind in kinds if kind in ROUTERS]
    few = st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=4, unique=True)
    return few.flatmap(lambda some: nodes(st.sampled_from(some), gates, st.one_of(chosen) if chosen else None))


def shuffled(node: Any, reverse: Callable[[], bool]) -> Any:
    """The same with the children of its Sums in another order."""
    if isinstance(node, str):
        return node
    children = [shuffled(c, reverse) for c in node.children]
    if isinstance(node, Seq):
        return Seq(*children)
    if node.router is not None:  # its scores go by the order
        return Sum(*children, weights=node.router)
    pairs = list(zip(children, node.weights, strict=True))
    pairs = pairs[::-1] if reverse() else pairs[1:] + pairs[:1]
    return Sum(*[c for c, _ in pairs], weights=[w for _, w in pairs])


# ---- batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows of these lengths, padded on one side, for one model."""

    model: str
    lengths: tuple[int, ...]
    side: str

    def inputs(self) -> tuple[Tensor, dict[str, Any]]:
        """(B, T) tokens, and what else the model is given."""
        tokens, mask = self.padded()
        return tokens, self._more(mask)

    def padded(self) -> tuple[Tensor, Tensor]:
        """(B, T) tokens and their mask."""
        longest = max(self.lengths)
        tokens = torch.zeros(len(self.lengths), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for b, n in enumerate(self.lengths):
            tokens[b, self._place(b)], mask[b, self._place(b)] = ids(1, n, seed=b)[0], 1
        return tokens, mask

    def row(self, b: int) -> tuple[Tensor, dict[str, Any]]:
        """The same for row b alone."""
        more = self._more(torch.ones(1, self.lengths[b], dtype=torch.long))
        return ids(1, self.lengths[b], seed=b), more

    def real(self, out: Tensor, b: int) -> Tensor:
        """Row b of an output, without padding."""
        whole = self.model in (*TWO_STACKS, *NO_TEXT, "bert")
        return out[b] if whole else out[b, self._place(b)]

    def _place(self, b: int) -> slice:
        n, longest = self.lengths[b], max(self.lengths)
        return slice(longest - n, longest) if self.side == "left" else slice(0, n)

    def _more(self, mask: Tensor) -> dict[str, Any]:
        more: dict[str, Any] = {} if self.model in NO_TEXT else {"attention_mask": mask}
        if self.model in COUNTED:
            more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if self.model in TWO_STACKS:
            more["decoder_input_ids"] = ids(1, 4).expand(len(mask), -1)
        return more


@st.composite
def batches(draw: st.DrawFn, model: str) -> Batch:
    count = draw(st.integers(1, 4))
    if model in NO_TEXT:
        return Batch(model, (5,) * count, "right")
    side = "right" if model in ABSOLUTE else draw(st.sampled_from(["left", "right"]))
    return Batch(model, tuple(draw(st.lists(st.integers(2, 7), min_size=count, max_size=count))), side)


@st.composite
def mixed(
    draw: st.DrawFn,
    model: str,
    names: Mapping[str, Any],
    kinds: Sequence[str] = EVERY_GATE,
) -> tuple[Batch, list[Any]]:
    """A batch, and a composition for each of its rows; some have none, some the same."""
    batch = draw(batches(model))
    count = len(batch.lengths)
    few = draw(st.lists(compositions(names, count, kinds), min_size=1, max_size=count))
    return batch, [draw(st.one_of(st.none(), st.sampled_from(few), st.sampled_from(few))) for _ in range(count)]


# ---- what cannot be, by its documented message -----------------------------------------------------------------------

UNEQUAL = r"A Sum adds prompts token by token; these have \[.*\] tokens"
PROMPT_PER_ROW = "A prompt cannot have a gate per row"
ONE_LENGTH = "The rows of a batch need prompts of one length"
BELOW_ZERO = "A joint prefix cannot have a gate below 0"
WEIGHT_PER_ROW = "a gate per row|a router"
ROUTING = (
    "nothing to choose: no two|cannot weigh the prompt|cannot weigh prompts|cannot weigh .* a parameter"
    "|weighs tokens, and|cannot pool the tokens|reads the factors|attends to what each adapter adds"
)
"""Of routers, when their parameters are made."""

Methods = dict[str, list[Any]]
"""Adapter name -> its methods at one place."""


def refusals(view: PeftModel, rows: list[Any]) -> set[str]:
    """The messages of which one must come for rows with these compositions; none where they must run."""
    rows = [Sum() if node is None else node for node in rows]
    found: set[str] = set()
    base: Any = view.base
    encoder = base.get_encoder() if getattr(getattr(base, "config", None), "is_encoder_decoder", False) else None
    for module, methods in _at(view, InputMethod):
        lengths = {_prompt(node, methods, found) for node in rows}
        if len(lengths) > 1 and counts_alone(module) and module is not encoder:  # which fills up behind its input
            found.add(ONE_LENGTH)
    for _, methods in _at(view, AttentionMethod):
        joint = {name for name, ms in methods.items() if any(getattr(m, "joint", False) for m in ms)}
        if any(gate < 0 for b, node in enumerate(rows) for name, gate in _gates(node, b) if name in joint):
            found.add(BELOW_ZERO)
    for module, methods in _at(view, WeightMethod):
        for node in rows:
            _per_row(node, methods, module, False, found)
    return found


def _at(view: PeftModel, kind: type) -> Iterator[tuple[Any, Methods]]:
    """The modules at which some adapter has a method of a kind, with everything that sits there."""
    parts = [(name, part) for name in view.peft_config for part in view.get_adapter(name).parts]
    for module in dict.fromkeys(part.place.module for _, part in parts if isinstance(part.method, kind)):
        methods: Methods = {}
        for name, part in parts:
            if part.place.module is module and (kind is WeightMethod or isinstance(part.method, kind)):
                methods.setdefault(name, []).append(part.method)
        yield module, methods


def _prompt(node: Any, methods: Methods, found: set[str]) -> int:
    """How many virtual tokens a composition has at one place."""
    if isinstance(node, str):
        return methods[node][0].prompt().shape[0] if node in methods else 0
    if isinstance(node, Seq):
        return sum(_prompt(c, methods, found) for c in node.children)
    there = [
        (_prompt(c, methods, found), w) for c, w in zip(node.children, node.weights, strict=True) if not is_zero(w)
    ]
    there = [(n, w) for n, w in there if n]
    if len({n for n, _ in there}) > 1:
        found.add(UNEQUAL)
    if any(isinstance(w, Tensor) for _, w in there):
        found.add(PROMPT_PER_ROW)
    return max((n for n, _ in there), default=0)


def _gates(node: Any, b: int, gate: float = 1.0) -> Iterator[tuple[str, float]]:
    """Every use of a name, and the product of the gates in front of it in row b."""
    if isinstance(node, str):
        yield node, gate
        return
    weights = node.weights if isinstance(node, Sum) else (1.0,) * len(node.children)
    for child, weight in zip(node.children, weights, strict=True):
        yield from _gates(child, b, gate * _number(weight, b))


def _number(weight: Any, b: int) -> float:
    match weight:
        case Tensor():
            return float(weight[b])
        case float():
            return weight
        case _:
            return 1.0  # learned and chosen ones are above 0


def _per_row(node: Any, methods: Methods, module: Any, below: bool, found: set[str]) -> bool:
    """Whether the weight above `node` differs from row to row; a method that would read such a one is noted."""
    if isinstance(node, str):
        if below and any(_reads(m, module) for m in methods.get(node, ())):
            found.add(WEIGHT_PER_ROW)
        return below
    if isinstance(node, Seq):
        for child in node.children:
            below = _per_row(child, methods, module, below, found)
        return below
    there = [(c, w) for c, w in zip(node.children, node.weights, strict=True) if _has(c, methods) and not is_zero(w)]
    inside = [_per_row(c, methods, module, below, found) for c, _ in there]
    return below or any(inside) or any(isinstance(w, Tensor | Routed) for _, w in there)


class _Read(Exception):
    """A weight was."""


class _Unread(Around):
    """A layer that can be called."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.apply(x, self.inner.weight(), self.bias)

    def weight(self) -> Tensor:
        raise _Read

    def squares(self) -> Tensor:
        raise _Read


def _reads(method: Any, module: Any) -> bool:
    """Whether a method's forward reads the weight that it stands on, and not only calls the layer."""
    if not isinstance(method, WeightMethod):
        return False
    layer = Layer(module, "")
    match layer.kind.name:
        case "embedding":
            x = torch.zeros(1, 2, dtype=torch.long)
        case "conv":
            x = torch.zeros(1, layer.shape[1] * module.groups, *[8] * (module.weight.dim() - 2))
        case _:
            assert layer.input_width is not None
            x = torch.zeros(1, 2, layer.input_width)
    try:
        with torch.no_grad():
            method(x, _Unread(layer))
    except _Read:
        return True
    return False


def _has(node: Any, methods: Methods) -> bool:
    return node in methods if isinstance(node, str) else any(_has(c, methods) for c in node.children)
