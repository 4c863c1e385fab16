"""What do several LoRAs cost that are trained together: in one forward, in turn, or on rows of their own?

    python -m benchmarks.parallel_serial

prints tables and writes them to benchmarks/results/. All ways take turns in each repetition, so that what else the
machine does meets all of them; figures are medians over the repetitions.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

import coadapt
from coadapt import LoraConfig, PeftModel
from coadapt.training.live import Live

from .report import machine
from .setting import Setting, checkpointed, llama

WIDTH, LAYERS, HEADS, INNER, VOCABULARY = 256, 4, 4, 704, 1024
ROWS, LENGTH = 4, 128
COUNTS = (2, 4, 8)
MIB = 2**20


def model(count: int, checkpointing: bool) -> PeftModel:
    """A random Llama with so many LoRAs on all of its linear layers."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    view = PeftModel(llama(Setting(), **sizes, intermediate_size=INNER, vocab_size=VOCABULARY))
    for i in range(count):
        view.add_adapter(f"a{i}", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    return (checkpointed(view) if checkpointing else view).train()


def tokens(rows: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


Way = Callable[[PeftModel, list[str]], Iterator[Tensor]]
"""Gives the losses of a step, each of which has a backward of its own."""


def one(view: PeftModel, names: list[str]) -> Iterator[Tensor]:
    ids = tokens(ROWS)
    yield loss(view(ids, adapters=names[0]).logits, ids)


def parallel(view: PeftModel, names: list[str]) -> Iterator[Tensor]:
    ids = tokens(ROWS)
    yield loss(view(ids, adapters=names).logits, ids)


def serial(view: PeftModel, names: list[str]) -> Iterator[Tensor]:
    ids = tokens(ROWS)
    yield loss(torch.stack([view(ids, adapters=name).logits for name in names]).sum(0), ids)


def one_batch(view: PeftModel, names: list[str]) -> Iterator[Tensor]:
    ids = tokens(ROWS * len(names))
    yield loss(view(ids, adapter_names=[name for name in names for _ in range(ROWS)]).logits, ids)


def batch_each(view: PeftModel, names: list[str]) -> Iterator[Tensor]:
    for name, ids in zip(names, tokens(ROWS * len(names)).split(ROWS), strict=True):
        yield loss(view(ids, adapters=name).logits, ids)


WAYS: dict[str, tuple[Way, bool]] = {
    "one LoRA alone": (one, False),
    "parallel": (parallel, False),
    "serial": (serial, False),
    "parallel, checkpointed": (parallel, True),
    "serial, checkpointed": (serial, True),
    "rows: one batch": (one_batch, False),
    "rows: a batch each": (batch_each, False),
}


@dataclass(frozen=True)
class Cost:
    """Of one step: seconds of the processor, and the bytes that a backward finds saved at most."""

    seconds: float
    saved: int


def seconds(way: Way, view: PeftModel, names: list[str]) -> float:
    begun = time.process_time()
    for value in way(view, names):
        value.backward()
    took = time.process_time() - begun
    view.zero_grad()
    return took


def saved(way: Way, view: PeftModel, names: list[str]) -> int:
    """All that the forward made and that is alive, each storage once."""
    most = 0
    with Live() as live:
        for value in way(view, names):
            most = max(most, live.now)
            value.backward()
            view.zero_grad()
    return most


def measure(count: int, repetitions: int) -> dict[str, Cost]:
    views = {checkpointing: model(count, checkpointing) for checkpointing in (False, True)}
    names = [f"a{i}" for i in range(count)]
    bytes_of = {name: saved(way, views[kind], names) for name, (way, kind) in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    order = random.Random(0)
    for repetition in range(repetitions + 1):
        for name in order.sample(list(WAYS), len(WAYS)):
            way, kind = WAYS[name]
            took = seconds(way, views[kind], names)
            if repetition:  # the first one warms up
                times[name].append(took)
    return {name: Cost(statistics.median(times[name]), bytes_of[name]) for name in WAYS}


def table(found: dict[int, dict[str, Cost]]) -> str:
    counts = list(found)
    head = "".join(f" {n} LoRAs: ms | times | MiB saved | times |" for n in counts)
    lines = [f"| way |{head}", "|---|" + "--:|--:|--:|--:|" * len(counts)]
    for name in WAYS:
        cells: list[str] = []
        for n in counts:
            cost, unit = found[n][name], found[n]["one LoRA alone"]
            cells += [f"{cost.seconds * 1e3:.0f}", f"{cost.seconds / unit.seconds:.2f}"]
            cells += [f"{cost.saved / MIB:.1f}", f"{cost.saved / unit.saved:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(found: dict[int, dict[str, Cost]]) -> str:
    pairs = [("serial", "parallel"), ("serial, checkpointed", "parallel, checkpointed")]
    pairs += [("rows: a batch each", "rows: one batch")]
    lines = ["| ratio |" + "".join(f" {n} LoRAs: time | saved |" for n in found), "|---|" + "--:|--:|" * len(found)]
    for one, other in pairs:
        cells: list[Any] = []
        for costs in found.values():
            cells += [
                f"{costs[one].seconds / costs[other].seconds:.2f}",
                f"{costs[one].saved / costs[other].saved:.2f}",
            ]
        lines.append(f"| {one} / {other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {count: measure(count, given.repetitions) for count in COUNTS}
    sizes = f"{LAYERS} layers of width {WIDTH}, {INNER} inside, {HEADS} heads, {VOCABULARY} tokens"
    text = "\n".join(
        [
            f"# Several LoRAs in parallel and in series, {date.today()}\n",
            f"`python -m benchmarks.parallel_serial --repetitions {given.repetitions}` with coadapt "
            f"{coadapt.__version__}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, on {machine()}. A Llama with {sizes}, fp32; LoRAs of rank 8 on "
            f"all linear layers. Forward and backward, without the optimiser. Medians of {given.repetitions} "
            "repetitions in which the ways take turns. ms: time of the processor; times: that of one LoRA alone; MiB "
            "saved: what the backward finds, without weights.\n",
            f"parallel, serial: the same {ROWS} rows of {LENGTH} tokens for all; parallel sums them in one forward, "
            "serial makes a forward for each and one backward through the sum of the logits. rows: "
            f"{ROWS} rows for each LoRA, in one batch (`adapter_names`) or in a batch each, with a backward each.\n",
            ratios(found),
            "",
            table(found),
        ]
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"parallel_serial-{date.today()}.md").write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
