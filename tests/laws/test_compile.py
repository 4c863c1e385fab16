"""A compiled view, in one graph, gives what it gives uncompiled."""

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

from coadapt import BottleneckConfig, Learned, LoraConfig, PeftModel, Sum
from laws.setting import EVERY, MAKE, attach, close, far, gradients, ids, logits, loss, pairs, same_gradients

COMPILED = ("llama", "gpt2", "bert", "plain", "qwen3", "gemma3", "opt", "vit", "mixtral", "conv")
"""Whose bases torch can compile into one graph; BLOOM and T5 read values of tensors in their forward."""


def one_layer(model: str, *cases: str) -> PeftModel:
    """Compiling takes seconds for each layer. (The case `adaption` has two.)"""
    layers = 2 if "adaption" in cases else 1
    size = {"gpt2": {"n_layer": layers}, "plain": {}, "conv": {}}.get(model, {"num_hidden_layers": layers})
    size = {**size, "layer_types": ["sliding_attention"] * layers} if model == "gemma3" else size
    return attach(MAKE[model](**size), model, *cases, by=0.3)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(view: Any, backend: str = "eager") -> Any:
    return torch.compile(view, fullgraph=True, backend=backend)


@pairs(0, cases=[case for case in EVERY if case != "p-tuning-lstm"], models=COMPILED)  # PyTorch compiles no LSTM
@pytest.mark.full
def test_compiled_equals_eager(case: str, model: str) -> None:
    """Seconds each, so that the default run has the three below."""
    view = one_layer(model, case)
    expected = logits(view)
    with torch.no_grad():
        close(logits(compiled(view)), expected)
    far(expected, logits(view.base))


MIXES = [
    ("plain", ("lora-bias", "bottleneck-parallel", "bitfit")),
    ("llama", ("lora", "bottleneck", "prefix", "prompt")),
    *(
        pytest.param(model, mix, marks=pytest.mark.full)
        for model, mix in (
            ("gpt2", ("prompt", "lora-all-linear", "prefix-decoupled")),
            ("bert", ("prefix-projected", "bottleneck")),
        )
    ),
]


@pytest.mark.parametrize(("model", "mix"), MIXES)
def test_a_mix_of_methods_with_gates(model: str, mix: tuple[str, ...]) -> None:
    """Outputs and gradients, those of learned gates too."""
    view = one_layer(model, *mix).train()
    names = view.active_adapters
    view.set_adapter(Sum(*names, weights=[Learned(0.5), *[0.3 + 0.7 * (n in "cd") for n in names[1:]]]))
    expected = logits(view)
    loss(view).backward()
    eager = gradients(view)
    made = compiled(view, "aot_eager")
    close(logits(made), expected, 5e-6)
    loss(made).backward()
    same_gradients(gradients(view), eager)


def test_no_active_adapter_is_the_base() -> None:
    view = one_layer("plain", "lora")
    view.set_adapter(None)
    with torch.no_grad():
        assert torch.equal(logits(compiled(view)), logits(view.base))


def test_the_compiled_base_stays_the_base() -> None:
    view = one_layer("plain", "lora", "bottleneck")
    with torch.no_grad():
        close(logits(compiled(view.base)), logits(view.base))
        close(logits(compiled(view)), logits(view))


def test_an_optimiser_step_is_seen() -> None:
    view = one_layer("plain", "lora")
    made = compiled(view)
    first = logits(made)
    with torch.no_grad():
        for parameter in view.adapters.parameters():
            parameter.mul_(2)
    far(logits(made), first)
    close(logits(made, ids(seed=4)), logits(view, ids(seed=4)))


SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("roomy", [True, False])
def test_one_graph_for_whatever_is_active(roomy: bool) -> None:
    """Switched, weighed, row by row, and adapters of other ranks and targets in the place of others (probe P17)."""
    drawn = random.Random(0)
    view = PeftModel(MAKE["llama"](num_hidden_layers=1))

    def add(name: str) -> None:
        targets = drawn.sample(SITES, 3)
        view.add_adapter(name, LoraConfig(r=drawn.choice((1, 2, 4)), target_modules=targets, init_lora_weights=False))

    def some() -> Sum:
        names = drawn.sample("abcdefgh", drawn.randint(1, 3))
        return Sum(*names, weights=[drawn.uniform(-1, 1) for _ in names])

    for name in "abcdefgh":
        add(name)
    if roomy:
        view.reserve(8, LoraConfig(r=4, target_modules="all-linear"))
    graphs: list[Any] = []
    made = torch.compile(view, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
    tokens = ids(3, 4)
    with torch.no_grad():
        for step in range(20 if roomy else 6):
            how: dict[str, Any] = {}
            match step % 4 if roomy else step % 3:
                case 0:
                    view.set_adapter(some())
                case 1:
                    how = {"adapters": some()}
                case 2:
                    how = {"adapter_names": [some(), None, "a + 0.5*b"]}
                case _:
                    view.set_adapter(None)
                    name = drawn.choice("abcdefgh")
                    view.delete_adapter(name)
                    add(name)
                    how = {"adapters": name}
            close(made(tokens, **how).logits, view(tokens, **how).logits, 2e-6)
    assert len(graphs) == 1


def test_nothing_active_costs_nothing() -> None:
    """The base has a graph of its own then, and keeps it."""
    view = one_layer("plain", "lora")
    graphs: list[Any] = []

    def kept(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(view.base, fullgraph=True, backend=kept)(input_ids=ids())  # type: ignore[arg-type]
        made = torch.compile(view, fullgraph=True, backend=kept)  # type: ignore[arg-type]
        for name in (None, "a", None, "a"):
            view.set_adapter(name)
            close(logits(made), logits(view), 2e-6)
    base, nothing, slots = (len(graph.graph.nodes) for graph in graphs)
    assert base == nothing < slots


def test_dropout_is_not_left_out() -> None:
    view = PeftModel(MAKE["llama"](num_hidden_layers=1), LoraConfig(lora_dropout=0.9, init_lora_weights=False), "a")
    made = compiled(view.train())
    with torch.no_grad():
        far(logits(made), logits(made))
        close(logits(compiled(view.eval())), logits(view))


def test_slots_filled_in_inference_mode_are_filled_again_outside() -> None:
    view = one_layer("llama", "lora")
    made = compiled(view)
    with torch.inference_mode():
        first = made(ids()).logits.clone()
    with torch.no_grad():
        for parameter in view.adapters.parameters():
            parameter.mul_(2)
        far(made(ids()).logits, first)
        close(made(ids()).logits, view(ids()).logits)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_base_of_pytorchs_own_classes_is_one_graph(gradients: bool) -> None:
    """torch.compile starts in no code of PyTorch's own, as that of nn.Sequential, and says nothing of it."""
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    view = PeftModel(base, LoraConfig(r=2, target_modules=r"\d", init_lora_weights=False), "a")
    graphs: list[Any] = []
    made = torch.compile(view, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(gradients):
        close(made(x), view(x))
    assert len(graphs) == 1


def test_room_that_cannot_be() -> None:
    view = one_layer("llama", "lora")
    with pytest.raises(ValueError, match="only what has factors at linear layers"):
        view.reserve(2, BottleneckConfig())
    for number in (0, True, "2"):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            view.reserve(number, LoraConfig())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="A configuration of coadapt is needed"):
        view.reserve(2, "lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_modules matches no module"):
        view.reserve(2, LoraConfig(target_modules=["nope"]))


def test_compiled_first_of_all_on_a_thread() -> None:
    """A thread on which no view was called before; the second view finds what the first one left there."""
    expected = [logits(one_layer("plain", case)) for case in ("lora", "bottleneck")]
    found: list[Any] = []

    def run() -> None:
        with torch.no_grad():
            found.extend(logits(compiled(one_layer("plain", case))) for case in ("lora", "bottleneck"))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("mix", [("lora",), ("lora", "bottleneck", "ia3"), ("dora", "lora")])
def test_tokens_one_by_one_into_a_static_cache(mix: tuple[str, ...]) -> None:
    """In two graphs, one for the prompt and one for every token after it; as `generate` writes them uncompiled."""
    view = one_layer("llama", *mix).eval()
    tokens, count = ids(2, 5), 6
    expected = view.generate(tokens, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
    graphs: list[Any] = []
    made = torch.compile(view, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
    written, new, at = tokens, tokens, torch.arange(5).expand(2, -1)
    cache = StaticCache(config=view.base.config, max_cache_len=16)  # type: ignore[arg-type]
    with torch.no_grad():
        for _ in range(count):
            new = made(input_ids=new, past_key_values=cache, position_ids=at, use_cache=True).logits[:, -1:].argmax(-1)
            written, at = torch.cat([written, new], 1), at[:, -1:] + 1
    assert torch.equal(written, expected)
    assert len(graphs) == 2
