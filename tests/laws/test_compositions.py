"""Seq, Sum and gates obey their formulas, on whole models and against a second, naive evaluation."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from coadapt import (
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Seq,
    Sum,
)
from laws.setting import MAKE, attach, close, far, few, ids, logits, pairs, rest, stir, view_on

GATED = [
    "lora",
    "lora-all-linear",
    "lora-bias",
    "bottleneck",
    "bottleneck-parallel",
    "bitfit",
    "prefix",
    "prefix-decoupled",
]
"""What a gate of 0 takes away wholly; a prompt at gate 0 is left out, too, but see below."""


@pairs(0)
def test_sum_of_one_is_it_and_of_none_the_base(case: str, model: str) -> None:
    view = view_on(model, case, by=0.3)
    alone, base = logits(view, adapters="a"), logits(view.base)
    far(alone, base)
    close(logits(view, adapters=Sum("a", weights=[1])), alone)
    close(logits(view, adapters=Seq("a")), alone)
    close(logits(view, adapters=Sum(Sum(Seq("a")), Sum())), alone)
    close(logits(view, adapters=Seq(Sum(), "a", Seq())), alone)
    for nothing in (Sum(), Seq(), Seq(Sum(), Seq()), Sum("a", weights=[0]), "0*a", Sum(Seq("a"), weights=[0.0])):
        close(logits(view, adapters=nothing), base)


@pairs(1, cases=GATED)
def test_gates_that_are_tensors_equal_numbers(case: str, model: str) -> None:
    view = view_on(model, case, "lora")
    for gate in (0.0, 0.5, 1.0):
        rows = torch.full((3,), gate)
        if gate == 0.0 and case == "prefix":  # positions are moved by a prefix that is there, whatever its gate
            continue
        close(logits(view, adapters=Sum("a", weights=[rows])), logits(view, adapters=Sum("a", weights=[gate])), 5e-6)


@pairs(2)
def test_sum_commutes(case: str, model: str) -> None:
    view = view_on(model, case, "lora", case)
    one = logits(view, adapters="0.5*a + 2*b + c")
    close(logits(view, adapters="c + 0.5*a + 2*b"), one, 5e-6)
    close(logits(view, adapters="2*b + (c + 0.5*a)"), one, 5e-6)
    far(one, logits(view, adapters="a + b + 0.5*c"))


@pairs(3, cases=["lora", "lora-all-linear", "lora-bias", "bitfit", "prefix-decoupled"])
def test_seq_equals_sum_where_changes_add_up(case: str, model: str) -> None:
    view = view_on(model, case, case)
    close(logits(view, adapters="a >> b"), logits(view, adapters="a + b"), 5e-6)
    close(logits(view, adapters="a >> b"), logits(view, adapters="b >> a"), 5e-6)


def test_order_matters_where_it_does() -> None:
    for first, second in (
        ("bottleneck", "lora"),
        ("bottleneck", "bottleneck"),
        ("prompt", "prompt"),
        ("bottleneck", "bitfit"),
    ):
        view = view_on("llama", first, first)
        if second != first:
            view.delete_adapter("b")
            torch.manual_seed(3)
            view.add_adapter(
                "b",
                LoraConfig(target_modules=["down_proj"])
                if second == "lora"
                else BitFitConfig(target_modules=["down_proj"]),
            )
            stir(view.get_adapter("b"), by=0.5)
        far(logits(view, adapters="a >> b"), logits(view, adapters="b >> a"))


# ---- layer methods on one layer, against the formulas written out ----------------------------------------------------

Call = Callable[[Tensor], Tensor]


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def by_hand(node: Any, f: Call, methods: dict[str, Any]) -> Call:
    """The definitions of DESIGN.md, word for word, without anything from core/."""
    match node:
        case str():
            return _one(methods[node], f)
        case Seq():
            for child in node.children:
                f = by_hand(child, f, methods)
            return f
        case _:
            terms = [(by_hand(c, f, methods), w) for c, w in zip(node.children, node.weights, strict=True)]
            return lambda x: f(x) + sum(_gate(w, x) * (e(x) - f(x)) for e, w in terms) if terms else f(x)


def _gate(weight: Any, x: Tensor) -> Any:
    return weight.view(-1, 1, 1) if isinstance(weight, Tensor) else weight


def _one(method: Any, f: Call) -> Call:
    match type(method).__name__:
        case "LoRA":
            return lambda x: f(x) + method.scale * x @ method.A.T @ method.B.T
        case "BitFit":
            return lambda x: f(x) + method.delta
        case _:

            def bottleneck(x: Tensor) -> Tensor:
                y = f(x)
                h = torch.relu(y @ method.down.weight.T + method.down.bias)
                return y + method.scale * (h @ method.up.weight.T + method.up.bias)

            return bottleneck


def one_layer() -> tuple[PeftModel, dict[str, Any]]:
    torch.manual_seed(0)
    view = PeftModel(One().requires_grad_(False))
    at = {"target_modules": ["layer"]}
    view.add_adapter("lora", LoraConfig(r=2, **at))
    view.add_adapter("wide", LoraConfig(r=3, lora_alpha=1, **at))
    view.add_adapter("bias", BitFitConfig(**at))
    view.add_adapter("serial", BottleneckConfig(bottleneck_size=3, scaling=0.5, **at))
    for i, name in enumerate(view.peft_config):
        stir(view.get_adapter(name), seed=i, by=0.3)
    return view, {name: view.get_adapter(name).parts[0].method for name in view.peft_config}


NAMES = st.sampled_from(["lora", "wide", "bias", "serial"])
NUMBERS = st.floats(-2, 2, width=32)
ROWS = st.lists(NUMBERS, min_size=3, max_size=3).map(torch.tensor)


def _sums(children: st.SearchStrategy[Any], gates: st.SearchStrategy[Any]) -> st.SearchStrategy[Sum]:
    pair = st.lists(st.tuples(children, gates), max_size=3)
    return pair.map(lambda found: Sum(*[c for c, _ in found], weights=[w for _, w in found]))


def compositions(gates: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Trees of Seq and Sum, up to eight names in them, any name more than once."""
    return st.recursive(
        NAMES,
        lambda inner: st.one_of(_sums(inner, gates), st.lists(inner, max_size=3).map(lambda c: Seq(*c))),
        max_leaves=8,
    )


LAYER, METHODS = one_layer()
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(3))


@few
@given(node=compositions(st.one_of(NUMBERS, ROWS)))
def test_any_composition_equals_the_formula(node: Any) -> None:
    close(LAYER(X, adapters=node), by_hand(node, LAYER.base, METHODS)(X), 5e-6)


@few
@given(nodes=st.lists(compositions(NUMBERS), min_size=3, max_size=3))
def test_any_composition_for_each_row_equals_the_formula(nodes: list[Any]) -> None:
    mixed = LAYER(X, adapter_names=nodes)
    for b, node in enumerate(nodes):
        close(mixed[b], by_hand(node, LAYER.base, METHODS)(X[b : b + 1])[0], 5e-6)


@few
@given(node=compositions(NUMBERS))
def test_the_text_form_says_the_same(node: Any) -> None:
    text = _text(node)
    if text is not None:
        close(LAYER(X, adapters=text), LAYER(X, adapters=node), 5e-6)


def _text(node: Any) -> str | None:
    """None for what has no text: an empty Seq or Sum, or a number that is written with an exponent."""
    if isinstance(node, str):
        return node
    inner = [_text(c) for c in node.children]
    if not inner or None in inner:
        return None
    if isinstance(node, Seq):
        return "(" + " >> ".join(map(str, inner)) + ")"
    return (
        "("
        + " + ".join(
            f"({abs(w):.9f}*{t})" if w >= 0 else f"(-{abs(w):.9f}*{t})"
            for t, w in zip(inner, node.weights, strict=True)
        )
        + ")"
    )


# ---- prompts and prefixes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2", "bloom", "opt", "gemma3", *rest("gemma2", "qwen2", "mixtral")])
def test_prompts_in_a_seq_are_joined_and_in_a_sum_added(model: str) -> None:
    base = MAKE[model]()
    view = PeftModel(base)
    for i, (name, n) in enumerate({"p": 3, "q": 3, "r": 2}.items()):
        torch.manual_seed(i)
        view.add_adapter(name, PromptTuningConfig(num_virtual_tokens=n))
    p, q, r = (view.get_adapter(n).parts[0].method.P for n in "pqr")
    embedded = base.get_input_embeddings()(ids())
    for text, tokens in {
        "p": p, "q >> p": torch.cat([q, p]), "p >> r >> q": torch.cat([p, r, q]), "0.5*p - q": 0.5 * p - q,
        "r >> (p + 2*q)": torch.cat([r, p + 2 * q]), "(r >> p) + (p >> r)": torch.cat([r, p]) + torch.cat([p, r]),
    }.items():  # fmt: skip
        joined = torch.cat([tokens.expand(3, -1, -1), embedded], dim=1)
        close(logits(view, adapters=text), base(inputs_embeds=joined).logits[:, len(tokens) :], 2e-6)
    with pytest.raises(ValueError, match=r"\[2, 3\] tokens"):
        logits(view, adapters="p + r")


@pytest.mark.parametrize("model", ["llama", "gpt2", "opt", *rest("qwen2", "qwen3", "mixtral")])
def test_prefix_is_what_a_cache_would_hold(model: str) -> None:
    """Keys and values of the prefix as a cache, positions moved by its length: the field's way."""
    from transformers import DynamicCache

    base = MAKE[model]()
    view = attach(base, model, "prefix")
    cache = DynamicCache(config=base.config)
    for i, part in enumerate(view.get_adapter("a").parts):
        keys, values = part.method.prefix()
        cache.update(keys.expand(3, -1, -1, -1), values.expand(3, -1, -1, -1), i)
    expected = base(
        input_ids=ids(), past_key_values=cache, attention_mask=torch.ones(3, 10), position_ids=torch.arange(3, 10)[None]
    ).logits
    close(logits(view), expected, 2e-6)


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", "bert", "gemma2", *rest("opt", "gemma3", "qwen3", "mixtral")])
def test_a_gate_before_a_joint_prefix_counts_it_that_often(model: str) -> None:
    """log g on its scores: gate 2 is the prefix twice, a half and a half is it once; 0 is its absence."""
    view = PeftModel(MAKE[model]())
    for i, name in enumerate("pq"):
        torch.manual_seed(i)
        view.add_adapter(
            name, PrefixTuningConfig(num_virtual_tokens=3, position_offset=None if model in ("t5",) else 0)
        )
        stir(view.get_adapter(name), seed=i, by=0.5)
    once = logits(view, adapters="p")
    far(once, logits(view.base))
    close(logits(view, adapters="2*p"), logits(view, adapters="p + p"), 5e-6)
    close(logits(view, adapters="0.5*p + 0.5*p"), once, 5e-6)
    close(logits(view, adapters=Sum("p", "q", weights=[torch.ones(3), torch.zeros(3)])), once, 5e-6)
    close(logits(view, adapters=Sum("p", weights=[torch.zeros(3)])), logits(view.base), 5e-6)
    close(logits(view, adapters="p >> q"), logits(view, adapters="q + p"), 5e-6)
    with pytest.raises(ValueError, match="below 0"):
        logits(view, adapters="-1*p")
