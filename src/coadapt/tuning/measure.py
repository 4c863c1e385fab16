"""What a training costs and what it came to: seconds and bytes of its steps, and the held-out rows put to it."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coadapt.evaluation.exam import Exam, asked_and_wanted, virtual_tokens
from coadapt.evaluation.metrics import METRICS, Metric
from coadapt.evaluation.scoring import Score, score
from coadapt.formats.files import aside, read_json
from coadapt.model import PeftModel
from coadapt.training.assemble import positions
from coadapt.training.live import Live
from coadapt.training.material import Material, Part

CALLS = 7
"""Of a batch, to time it; the median is kept."""
BEYOND = 8
"""Tokens that an answer may have more than the longest that is wanted: one that does not end is wrong by then."""


class Meter(TrainerCallback):
    """As a context: times the steps of a run without its evaluations, and measures the memory of its second step.

    On a GPU that is the most that its allocator gave out; elsewhere the bytes of the model, of the optimiser's state,
    and of the tensors that are alive at once within the step, which is not timed. What was measured is written to
    `file` with each checkpoint, and read again by a run that is resumed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds, self.steps, self.peak = 0.0, 0, 0
        self._live: Live | None = None
        self._begun, self._first = 0.0, 0

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:  # a step that did not come to its end
            self._live.__exit__(None, None, None)
            self._live = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step and self.file.is_file():
            known = read_json(self.file)
            self.seconds, self.steps, self.peak = known["seconds"], known["steps"], known["peak"]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._first = state.global_step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == min(self._first + 1, state.max_steps - 1) and not on_gpu(args):
            self._live = Live()
            self._live.__enter__()
        self._begun = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        if on_gpu(args):
            torch.cuda.synchronize()
        took = time.perf_counter() - self._begun
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self.peak = max(self.peak, held(model, optimizer) + self._live.peak)
            self._live = None
        elif state.global_step > self._first + 1:  # the first step makes plans and buffers
            self.seconds, self.steps = self.seconds + took, self.steps + 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        known = {"seconds": self.seconds, "steps": self.steps, "peak": self.peak}
        with aside(self.file) as file:
            file.write_text(json.dumps(known), "utf-8")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if on_gpu(args):
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.on_save(args, state, control)

    def read(self) -> "Meter":
        """With what was written, where no step was left to make."""
        if not self.steps and self.file.is_file():
            known = read_json(self.file)
            self.seconds, self.steps, self.peak = known["seconds"], known["steps"], known["peak"]
        return self

    @property
    def seconds_per_step(self) -> float | None:
        """None where there were too few steps to time one."""
        return self.seconds / self.steps if self.steps else None


def on_gpu(args: TrainingArguments) -> bool:
    """Whether the run is on one that PyTorch keeps the memory of."""
    return args.device.type == "cuda"


def held(model: nn.Module | None, optimizer: Optimizer | None) -> int:
    """Bytes of the weights (the base's and the adapters') and of the optimiser's state."""
    base = model.get_base_model() if isinstance(model, PeftModel) else None
    modules = [m for m in (model, base) if m is not None]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    states = [] if inner is None else [v for state in inner.state.values() for v in state.values()]
    every = {id(t): t for t in (*tensors, *states) if isinstance(t, Tensor)}
    return sum(t.nbytes for t in every.values())


def exam(
    view: PeftModel, material: Material, metrics: Sequence[Metric], batch_size: int, part: Part | None = None
) -> Exam:
    """The held-out rows of `material` (of one data set among several), as they are put to the model."""
    made = (part or material.first).made
    assert made.held_out is not None
    rows: list[Any] = [dict(row) for row in made.held_out]
    tokenizer = material.processor if isinstance(material.processor, PreTrainedTokenizerBase) else None
    generates = any(metric.generates for metric in metrics)
    longest = max(len(asked_and_wanted(row, material.task)[1]) for row in rows) if generates else 0
    known = [] if tokenizer is None else positions(cast(Any, view).config, tokenizer)
    return Exam(
        rows=rows,
        task=material.task,
        metrics=metrics,
        tokenizer=tokenizer,
        collate=material.collator(),
        batch_size=batch_size,
        max_new_tokens=longest + BEYOND,
        room=min(known) - virtual_tokens(view, list(view.peft_config)) if known else None,
        classes=material.classes,
    )


def held_out_loss(view: PeftModel, material: Material, batch_size: int) -> float:
    """Over all trained tokens of the held-out rows."""
    found = score(view, exam(view, material, [METRICS["loss"]], batch_size), view.composition)["loss"]
    return mean_of(found)


def mean_of(found: Score) -> float:
    """Over all rows, by their weights."""
    return float(np.average(found.values, weights=found.weights))


def latency(view: PeftModel, material: Material, batch_size: int) -> tuple[float, float]:
    """Seconds that a batch takes through the adapted model, and through the base: medians of calls that take turns."""
    made, device = material.first.made, cast(Any, view).device
    assert made.held_out is not None
    rows = [made.held_out[i] for i in range(min(batch_size, len(made.held_out)))]
    batch = {name: value.to(device) for name, value in material.collator()(rows).items()}
    view.eval()

    def base() -> None:
        with view.disable_adapter():
            view(**batch)

    took: dict[Callable[[], Any], list[float]] = {base: [], lambda: view(**batch): []}
    with torch.inference_mode():
        for call in took:
            call()
        for _ in range(CALLS):
            for call, seconds in took.items():
                seconds.append(_seconds(call, device))
    plain, adapted = (statistics.median(seconds) for seconds in took.values())
    return adapted, plain


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    begun = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
