"""`coadapt.estimate`: what a run will need, before anything is loaded."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from coadapt.training import memory
from coadapt.training.assemble import load_config
from coadapt.training.machine import chosen
from coadapt.training.material import gather, refuse_tasks
from coadapt.training.memory import Room
from coadapt.training.proof import ROWS
from coadapt.training.rehearsal import Rehearsal, rehearsal, synchronize
from coadapt.training.rows import Kinds, kinds
from coadapt.training.settings import PlannedRun, RunConfig, Task
from coadapt.training.step import Bytes
from coadapt.training.timetable import timetable

KEPT = 0.05
"""Share of the free memory that a batch must leave: what is freed comes back in pieces."""
MOST = 2**20
"""Rows of a batch that are asked for at most."""

WRITTEN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of types in a safetensors file."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What real steps came to, on random weights."""

    peak: int
    """Bytes: of live tensors, or of what the GPU's allocator gave out."""
    seconds: float
    """Of a step."""
    rss: int
    """Bytes that this process has had at most, libraries and all."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs. Bytes are of the step that needs most: all rows as long as the longest."""

    model: str
    task: Task
    adapters: Mapping[str, str]
    """Name -> method."""
    device: str
    dtype: str
    """Of the base's weights."""
    optimizer: str
    """By its name in transformers."""
    rows: int
    """Of a batch."""
    length: int
    """Tokens of a row; 0 for images."""
    target: int
    """Tokens of a target, of an encoder-decoder."""
    parameters: int
    """Of the base and its adapters."""
    trainable: int
    """Those of them that train."""
    base: int
    """Bytes of its weights and buffers."""
    step: Bytes
    evaluation: int
    """Bytes at most in an evaluation; 0 where there is none."""
    trial: int
    """Bytes at most while `train` tries a step first, where that has more rows than a batch; else 0."""
    room: Room
    largest_batch: int
    """Rows that fit; 0: not even one."""
    operations: int
    """Floating point operations of a step."""
    rate: float
    """Floating point operations per second of a product of matrices, here, in the type that the run computes in."""
    measured: Measured | None

    @property
    def parts(self) -> dict[str, tuple[int, str]]:
        """Part of a step -> its bytes, and what it is. They are not all there at once: see `step.peak`."""
        step = self.step
        return {
            "base": (self.base, f"weights in {self.dtype}, frozen"),
            "adapters": (step.weights - self.base, "their weights"),
            "gradients": (step.gradients, "of what trains"),
            "optimiser": (step.optimizer, self.optimizer),
            "activations": (step.activations, "what is kept for the backward, logits and loss among it"),
        }

    @property
    def peak(self) -> int:
        """Bytes at most in the whole run."""
        step = self.step.peak if self.measured is None else self.measured.peak
        return max(step, self.evaluation, self.trial)

    @property
    def fits(self) -> bool:
        """Whether there is room for it here."""
        return self.peak <= usable(self.room)

    @property
    def share(self) -> float:
        """Of the parameters, those that train."""
        return self.trainable / self.parameters

    @property
    def seconds(self) -> float:
        """Of a step: measured, or what it takes at least."""
        return self.operations / self.rate if self.measured is None else self.measured.seconds

    def plain(self) -> dict[str, Any]:
        """All of it as plain values."""
        more = ("peak", "fits", "share", "seconds")
        return {**asdict(self), **{name: getattr(self, name) for name in more}}


def estimate(*, calibrate: bool = False, **settings: Any) -> Estimate:
    """What a run needs, by the settings of `coadapt train`; `data` may be left out.

    `estimate(model="DIR_OR_ID", method="prompt + lora", r=8, per_device_train_batch_size=4, max_length=512)`. Only the
    model's configuration is read, and the tokenizer's where no length is told.

    Args:
        calibrate: run real steps, on random weights, which gives the time, and corrects the bytes.

    Raises:
        ValueError: settings that do not fit each other, the model or the data.
    """
    return estimated(PlannedRun(**settings), calibrate)


def estimated(run: RunConfig, calibrate: bool = False) -> Estimate:
    """As `estimate`, of settings that are read already."""
    config = load_config(run.model, run.revision)
    _refuse(run, config)
    material = gather(run, timetable(run)) if run.data or run.datasets else None
    refuse_tasks([material], "An estimate")
    found = kinds(run, config, material)
    run = run.model_copy(update={"task": found.train.task})
    device, dtype = chosen(run.use_cpu), dtype_of(run, config)
    weights = material.weights(run.mixing_temperature) if material else [1.0]
    room = memory.room(device)

    def begin(real: bool = False) -> AbstractContextManager[Rehearsal]:
        return rehearsal(run, config, found.train, device, weights=weights, dtype=dtype, real=real)

    measured = None
    with begin() as tried:
        figures = _counted(tried, found)
        step: Bytes = figures["step"]
        if not calibrate:
            figures["largest_batch"] = _largest(tried, step, usable(room))
    if calibrate:
        if step.peak > usable(room):
            raise ValueError(
                f"calibrate runs real steps, and {run.per_device_train_batch_size} rows would need "
                f"{memory.size(step.peak)} of the {memory.size(room.free)} that are free. Give a smaller "
                "per_device_train_batch_size or max_length."
            )
        with begin(real=True) as tried:
            measured = _measured(tried)
        with begin() as tried:
            figures["largest_batch"] = _largest(tried, step, usable(room), measured.peak)
    return Estimate(
        model=run.model,
        task=found.train.task,
        adapters={name: adapter.method for name, adapter in run.adapters.items()},
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        optimizer=run.optim,
        rows=run.per_device_train_batch_size,
        length=found.train.length,
        target=found.train.target,
        room=room,
        rate=rate(device, torch.bfloat16 if run.bf16 else torch.float16 if run.fp16 else dtype),
        measured=measured,
        **figures,
    )


def _counted(tried: Rehearsal, kinds: Kinds) -> dict[str, Any]:
    """What is found without data."""
    run, base = tried.run, tried.view.get_base_model()
    batch = run.per_device_train_batch_size
    held_out = None if run.eval_strategy == "no" else kinds.held_out
    trainable, all_of_them = tried.view.get_nb_trainable_parameters()
    step, operations = tried.step_and_operations(batch)
    return {
        "parameters": all_of_them,
        "trainable": trainable,
        "base": sum(t.nbytes for t in {id(t): t for t in (*base.parameters(), *base.buffers())}.values()),
        "step": step,
        "operations": operations,
        "evaluation": tried.evaluation(run.per_device_eval_batch_size, held_out) if held_out else 0,
        "trial": tried.trial(ROWS, kinds.first) if run.verify and batch < ROWS else 0,
    }


def _largest(tried: Rehearsal, step: Bytes, most: int, measured: int | None = None) -> int:
    """The most rows of a batch; what was measured of `step` corrects what comes and goes with the rows."""
    factor = 1.0 if measured is None else (measured - step.weights) / (step.peak - step.weights)
    batch = tried.run.per_device_train_batch_size

    def peak(rows: int) -> int:
        counted = step if rows == batch else tried.step(rows)
        return int(step.weights + factor * (counted.peak - step.weights))

    return largest_batch(peak, most, start=batch, least=len(tried.trainer.weights))


def _measured(tried: Rehearsal) -> Measured:
    """Two steps: one that counts bytes, and one that is timed, without the counting."""
    batch = tried.run.per_device_train_batch_size
    peak = tried.step(batch).peak
    return Measured(peak=peak, seconds=tried.seconds(batch), rss=memory.resident())


def usable(room: Room) -> int:
    """Bytes that a run may need."""
    return int(room.free * (1 - KEPT))


def largest_batch(peak: Callable[[int], int], most: int, *, start: int, least: int = 1) -> int:
    """The most rows whose peak is at most `most` bytes; 0 where `least` rows have a higher one, 2^20 where all fit.

    `peak` grows along straight lines, so the next rows to ask for are where a line through two known points gets to;
    where it turns between them, lines may creep, and every third time the middle is asked for.
    """
    known = {rows: peak(rows) for rows in sorted({least, max(start, least + 1)})}
    turn = 0
    while True:
        low = max((rows for rows, needed in known.items() if needed <= most), default=0)
        high = min((rows for rows, needed in known.items() if needed > most), default=MOST + 1)
        if low == 0 or high - low <= 1:
            return low
        below = max((rows for rows in known if rows < low), default=high)
        other = below if high > MOST or turn % 3 == 0 else high
        slope = (known[other] - known[low]) / (other - low)
        meets = int(low + (most - known[low]) / slope) if slope > 0 else 2 * low
        if turn % 3 == 2 and high <= MOST:
            meets = (low + high) // 2
        rows = min(max(meets, low + 1), high - 1)
        known[rows], turn = peak(rows), turn + 1


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of a product of two square matrices, the best of a few."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.2:
        at = time.perf_counter()
        torch.mm(a, a)
        synchronize(device)
        best = min(best, time.perf_counter() - at)
    return 2 * size**3 / best


def _refuse(run: RunConfig, config: PreTrainedConfig) -> None:
    if run.quantisation or getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"model={run.model!r} is quantised, and what its layers hold is known only to the library that makes them: "
            "estimate does not forecast it (docs/limits.md)."
        )


def dtype_of(run: RunConfig, config: PreTrainedConfig) -> torch.dtype:
    """The type that the base is loaded in; left to the model, what its configuration or else its weights say."""
    told = run.dtype if run.dtype != "auto" else getattr(config, "dtype", None)
    if told is not None:
        return told if isinstance(told, torch.dtype) else cast(torch.dtype, getattr(torch, told))
    for file in sorted(Path(run.model).glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for key in tensors.keys():
                if (found := tensors.get_slice(key).get_dtype()) in WRITTEN:
                    return WRITTEN[found]
    return torch.float32
