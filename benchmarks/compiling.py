"""F9: how many graphs are compiled while the composition changes."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo

from .report import COUNT, Row, absolute
from .setting import LIBRARIES, LORA, Setting, adapted, add_loras, config, llama, tokens

ADAPTERS, ROWS = 8, 4
"""How many there are, and the rows of the batch."""


class Counter:
    """A backend of torch.compile that runs graphs as they are, and counts them and what is in them."""

    def __init__(self) -> None:
        self.graphs, self.operations = 0, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        self.operations += sum(node.op.startswith("call_") for node in graph.graph.nodes)
        return graph.forward


def operations(model: nn.Module, x: Tensor) -> int:
    """In the graph of one call."""
    counter = Counter()
    torch.compiler.reset()
    torch.compile(model, backend=counter, fullgraph=True)(x)
    assert counter.graphs == 1, f"{counter.graphs} graphs, of a call that was to be one"
    return counter.operations


def small(library: str, setting: Setting) -> Any:
    base = llama(setting, hidden_size=64, intermediate_size=128, num_hidden_layers=setting.size(2, 1))
    view = adapted(library, base, "LoraConfig", **LORA).eval()
    add_loras(library, view, [f"a{i}" for i in range(1, ADAPTERS)])
    return view


Change = Callable[[Any, random.Random], dict[str, Any]]
"""Chooses something on a view; gives what is told to the call."""


def switch(view: Any, draw: random.Random) -> dict[str, Any]:
    view.set_adapter(f"a{draw.randrange(ADAPTERS)}")
    return {}


def weights(view: Any, draw: random.Random) -> dict[str, Any]:
    """A sum of some, weighted."""
    some = draw.sample(range(ADAPTERS), draw.randint(1, ADAPTERS))
    view.set_adapter(" + ".join(f"{draw.uniform(0.1, 2):.2f}*a{i}" for i in some))
    return {}


def rows(view: Any, draw: random.Random) -> dict[str, Any]:
    """A row each, some without any."""
    return {"adapter_names": [draw.choice([None, *(f"a{i}" for i in range(ADAPTERS))]) for _ in range(ROWS)]}


def hot_swap(view: Any, draw: random.Random) -> dict[str, Any]:
    """Another adapter under a name that was there, of another rank and at other layers."""
    name = f"a{draw.randrange(ADAPTERS)}"
    targets = draw.choice(["all-linear", ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]])
    view.delete_adapter(name)
    other = {**LORA, "r": draw.choice([2, 4, 8]), "target_modules": targets}
    view.add_adapter(name, config("coadapt", "LoraConfig", **other))
    view.set_adapter(name)
    return {}


def graphs(view: Any, setting: Setting, changes: Sequence[Change], times: int) -> list[float]:
    """How many a compiled view needs for so many changes, drawn by chance; each is compared with the eager view."""
    draw, counter, ids = random.Random(0), Counter(), tokens(setting, ROWS, 8)
    torch.compiler.reset()
    compiled: Any = torch.compile(view, backend=counter, fullgraph=True)
    with torch.no_grad(), dynamo.patch(recompile_limit=10 * times, accumulated_recompile_limit=10 * times):
        for _ in range(times):
            told = draw.choice(changes)(view, draw)
            found, expected = compiled(ids, **told).logits, view(ids, **told).logits
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()
    return [counter.graphs]


def compiling(setting: Setting) -> list[Row]:
    times = setting.size(50, 2)
    views = {library: small(library, setting) for library in LIBRARIES}
    switches = {library: graphs(view, setting, [switch], times) for library, view in views.items()}
    mixed = {"coadapt": graphs(views["coadapt"], setting, [switch, weights, rows, hot_swap], times)}
    return [
        absolute("F9", f"graphs for {times} switches among {ADAPTERS} adapters", switches, COUNT, 1),
        absolute("F9", f"graphs for {times} compositions: switch, weights, rows, hot-swap", mixed, COUNT, 1),
    ]
