"""Steps of a run that is not begun: on tensors without data, or on random weights. Their bytes are counted."""

import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig

from coadapt.config import PeftConfig
from coadapt.methods.prompt import PromptTuningConfig
from coadapt.model import PeftModel
from coadapt.training.assemble import adapter_config, attach, rates
from coadapt.training.course import Course
from coadapt.training.datasets import starts_from
from coadapt.training.folder import AUTO_NAMES
from coadapt.training.joint import DATASET, JointTrainer
from coadapt.training.live import Live, Meter, meter
from coadapt.training.losses import window
from coadapt.training.machine import first_line
from coadapt.training.mixing import shares
from coadapt.training.recommend import parameters
from coadapt.training.rows import Rows
from coadapt.training.run import training_arguments
from coadapt.training.settings import RunConfig
from coadapt.training.step import BATCHES, Bytes, one_step, settle, states
from coadapt.training.timetable import timetable

_CANNOT = "This run cannot be forecast, as its step cannot be run on tensors without data: {} (docs/limits.md)."


class _Still(JointTrainer):
    """Leaves the model where it is."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model

    def settle_window(self, rows: int) -> None:
        """As before a step, for a batch of so many rows: all adapters train."""
        counts = shares(rows, self.weights)
        self._rows = torch.tensor([d for d, n in enumerate(counts) for _ in range(n)])
        self._window = window([float(n) for n in counts], [self.course.plan.uses(name) for name in self.mixture.sets])


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A run whose steps can be tried."""

    run: RunConfig
    view: PeftModel
    rows: Rows
    device: torch.device
    weights: int
    """Bytes of the base and of the adapters."""
    trainer: _Still
    model: nn.Module
    """The view, as the trainer calls it."""
    meter: Meter

    def step(self, rows: int) -> Bytes:
        """A training step with so many rows in a batch."""
        self.model.train()
        return one_step(
            self.meter,
            self._loss(rows),
            self._optimizer,
            weights=self.weights,
            batches=self.run.gradient_accumulation_steps,
            backward=self.trainer.accelerator.backward,
            monitored=True,
        )

    def seconds(self, rows: int) -> float:
        """A step with so many rows in a batch, the faster of two, not counted."""
        optimizer, taken = self._optimizer, list[float]()
        with _disable_current_modes():
            for _ in range(2):
                synchronize(self.device)
                begun = time.perf_counter()
                for _ in range(self.run.gradient_accumulation_steps):
                    self.trainer.accelerator.backward(self._loss(rows)())
                optimizer.step()
                optimizer.zero_grad()
                synchronize(self.device)
                taken.append(time.perf_counter() - begun)
        return min(taken)

    def evaluation(self, rows: int, of: Rows) -> int:
        """Bytes at most while held-out rows are looked at."""
        self.model.eval()
        self.meter.restart()
        batch = of.batch(rows, self.device)
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            self.model(**batch)
        return self.meter.peak

    def trial(self, rows: int, of: Rows) -> int:
        """Bytes at most while a step is tried first, before the optimiser has states; two copies are kept meanwhile."""
        self.model.train()
        self.meter.restart()
        self.trainer.accelerator.backward(self._loss(rows, of)())
        copies = 2 * sum(p.nbytes for p in self.view.parameters() if p.requires_grad)
        peak = self.meter.peak - states(self._optimizer) + copies
        for parameter in self.view.parameters():
            parameter.grad = None
        return peak

    def step_and_operations(self, rows: int) -> tuple[Bytes, int]:
        """A step without data, and the floating point operations of all its batches."""
        assert isinstance(self.meter, Live)
        before, batches = self.meter.operations, self.run.gradient_accumulation_steps
        found = self.step(rows)
        return found, (self.meter.operations - before) * batches // min(batches, BATCHES)

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self.trainer.create_optimizer()
        assert isinstance(optimizer, Optimizer)
        return optimizer

    def _loss(self, rows: int, of: Rows | None = None) -> Callable[[], Tensor]:
        trainer = self.trainer
        if trainer.several:
            with _disable_current_modes():
                trainer.settle_window(rows)

        def loss() -> Tensor:
            batch = (of or self.rows).batch(rows, self.device)
            if trainer.several:
                batch[DATASET] = trainer._rows
            with trainer.compute_loss_context_manager():
                return cast(Tensor, trainer.compute_loss(self.model, batch, num_items_in_batch=cast(Any, rows)))

        return loss


@contextmanager
def rehearsal(
    run: RunConfig,
    config: PreTrainedConfig,
    rows: Rows,
    device: torch.device,
    *,
    weights: Sequence[float] = (1.0,),
    dtype: torch.dtype,
    real: bool = False,
) -> Iterator[Rehearsal]:
    """A model of this configuration with the run's adapters; nothing is loaded, and nothing is left changed.

    Args:
        weights: of each data set's rows in a batch.
        dtype: of the base.
        real: on tensors with data, on `device`; else on those that have only shapes.

    Raises:
        ValueError: settings that do not fit each other or the model.
    """
    fake = None if real else FakeTensorMode(allow_non_fake_inputs=True)
    counter = meter(device) if real else Live()
    with _nothing_changed(), _explained(real), tempfile.TemporaryDirectory() as out:
        if fake is not None:
            run, view = _attached(run, config, rows, torch.device("meta"), dtype)
        with fake or nullcontext(), counter:
            if fake is not None:
                view.to_empty(device=device)
                view.get_base_model().tie_weights()  # pyright: ignore[reportCallIssue]
            else:
                run, view = _attached(run, config, rows, device, dtype)
            held = counter.now
            trainer = _trainer(run, view, weights, Path(out))
            model = trainer.accelerator.prepare_model(view, device_placement=False)
            if run.gradient_checkpointing:  # as Trainer does when it begins
                getattr(view, _enable(view))()
            optimizer = trainer.create_optimizer()
            for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
                hooks.clear()  # the monitor's, which reads values; `one_step` holds what it holds
            settle(optimizer)
            yield Rehearsal(
                run=run,
                view=view,
                rows=rows,
                device=device,
                weights=held,
                trainer=trainer,
                model=model,
                meter=counter,
            )


def _attached(
    run: RunConfig, config: PreTrainedConfig, rows: Rows, device: torch.device, dtype: torch.dtype
) -> tuple[RunConfig, PeftModel]:
    with device:
        auto: Any = getattr(transformers, AUTO_NAMES[rows.task])
        base: nn.Module = auto.from_config(config, dtype=dtype)
        run = run.with_rates(parameters(base))
        configs = {name: adapter_config(name, adapter, rows.task) for name, adapter in run.adapters.items()}
        if device.type == "meta":
            configs = {name: _without_values(one) for name, one in configs.items()}
        active = run.composition if len(run.sources) > 1 else next(iter(run.sources.values())).composition
        new_head = rows.task == "image-classification"
        return run, attach(base, configs, active, new_head=new_head, order=starts_from(run))


def _without_values(config: PeftConfig) -> PeftConfig:
    """The same, started from values that are not read off the base: it has none here."""
    return config.with_random_start() if isinstance(config, PromptTuningConfig) else config


def _trainer(run: RunConfig, view: PeftModel, weights: Sequence[float], out: Path) -> _Still:
    names = list(run.sources)
    return _Still(
        model=view,
        rates=rates(run, view),
        weights=weights,
        course=Course(view, timetable(run)),
        task=run.task or "causal-lm",
        args=training_arguments(run, out, evaluates=False, steps=1),
        train_dataset=_Names(dict.fromkeys(names, ())),
    )


@dataclass
class _Names:
    """In place of a `Mixture`: the names of its data sets."""

    sets: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return 1


def _enable(view: PeftModel) -> str:
    name = "activation_checkpointing_enable"  # its name since transformers 5.20
    return name if hasattr(view, name) else "gradient_checkpointing_enable"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _explained(real: bool) -> Iterator[None]:
    """Where tensors without data do not do, a ValueError says so."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise ValueError(_CANNOT.format(f"an operation looks at values ({error})")) from error
    except (RuntimeError, NotImplementedError) as error:
        if real or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(_CANNOT.format(first_line(error))) from error
    finally:
        log.disabled = before


@contextmanager
def _nothing_changed() -> Iterator[None]:
    """Random numbers, which Trainer seeds, go on afterwards as if nothing had been; libraries' advice is not said."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
