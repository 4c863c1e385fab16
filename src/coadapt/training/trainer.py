"""transformers' Trainer with one optimiser group for each adapter: its own rate, warm-up, decay and clipping."""

import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer, TrainerState, get_scheduler

from coadapt.formats.files import CHECKPOINT, read_tensors
from coadapt.model import PeftModel
from coadapt.training import folder, memory
from coadapt.training.monitor import Monitor
from coadapt.training.units import GIB


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How one adapter is trained."""

    learning_rate: float
    warmup_steps: float = 0.0
    """At least 1: steps; below 1: a share of all steps."""
    max_grad_norm: float = 0.0
    """0: not clipped."""
    weight_decay: float = 0.0
    loraplus_lr_ratio: float | None = None
    """How many times as fast as A a LoRA's B learns."""
    start_step: int = 0
    """Its schedule begins there."""
    stop_step: int | None = None
    """And ends there; None: at the end of the run."""

    def group(self) -> dict[str, float]:
        """The options of its optimiser group, or groups."""
        plus = {} if self.loraplus_lr_ratio is None else {"loraplus_lr_ratio": self.loraplus_lr_ratio}
        return {
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "warmup_steps": self.warmup_steps,
            **plus,
        }


class AdapterTrainer(Trainer):
    """Trains a `PeftModel`. Everything but the optimiser's groups is transformers' own.

    Args:
        rates: adapter name -> how it is trained, for every adapter that trains; `"gates"` for learned gates.
        options: what `transformers.Trainer` takes. `args.max_grad_norm` must be 0: each adapter is clipped by itself.
    """

    def __init__(self, *, model: PeftModel, rates: Mapping[str, Rates], **options: Any) -> None:
        super().__init__(model=model, **options)
        if self.args.max_grad_norm:
            raise ValueError(
                f"args.max_grad_norm={self.args.max_grad_norm}: set it to 0, and Rates.max_grad_norm instead."
            )
        self.view = model
        self.rates = dict(rates)
        self.monitor = Monitor(model)
        self._measured = -1

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """One group for each adapter; its gradients are clipped right before the optimiser's step."""
        if self.optimizer is None:
            self.optimizer = self._new_optimizer(model)
            self.optimizer.register_step_pre_hook(self._before_step)
            self.optimizer.register_step_post_hook(self._after_step)
        return self.optimizer

    def forecast(self) -> memory.Forecast:
        """The memory that the run will hold from its first step to its last."""
        return memory.forecast(self.view.get_base_model(), _own(self.view), self._new_optimizer())

    def _new_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        groups = self.view.param_groups({name: rates.group() for name, rates in self.rates.items()})
        silent = [g["name"] for g in groups if g["name"] not in self.rates]
        if silent:
            raise ValueError(f"No rate is given for {', '.join(silent)}; rates has {', '.join(self.rates)}.")
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast(Any, model or self.model))
        return kind(groups, **options)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.monitor.before_step(self._moving(optimizer), self.state.global_step + 1, measure=self._will_log())

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.monitor.after_step(self._moving(optimizer))
        self._measured = self.state.global_step + 1

    def _moving(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """The groups that train in this step."""
        return optimizer.param_groups

    def _will_log(self) -> bool:
        """Whether the step that is about to be made is logged: at intervals, at the ends of epochs, at both ends."""
        step, state, args = self.state.global_step + 1, self.state, self.args
        kinds = ((args.logging_strategy, state.logging_steps), (args.eval_strategy, state.eval_steps))
        kinds += ((args.save_strategy, state.save_steps),)
        at_interval = any(kind == "steps" and step % every == 0 for kind, every in kinds)
        at_epoch = any(kind == "epoch" for kind, _ in kinds) and self.accelerator.gradient_state.end_of_dataloader
        return at_interval or at_epoch or step in (1, state.max_steps)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The usual schedule, with the warm-up of each group."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            factors = [self._factor(self.rates[group["name"]], num_training_steps) for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _factor(self, rates: Rates, steps: int) -> Any:
        """Step -> share of the peak rate, from transformers' own schedule of this type; 0 where it does not train."""
        start, stop = rates.start_step, steps if rates.stop_step is None else min(rates.stop_step, steps)
        warmup, length = rates.warmup_steps, stop - start
        stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        first = int(warmup) if warmup >= 1 else round(warmup * length)
        schedule = get_scheduler(self.args.lr_scheduler_type, stand_in, first, length)
        assert isinstance(schedule, LambdaLR)
        factor = schedule.lr_lambdas[0]
        if length == steps:
            return factor
        return lambda step: factor(step - start) if start <= step < stop else 0.0

    def take_up(self, checkpoint: Path) -> None:
        """Weights and state become those with which training ended at `checkpoint`; the best weights, where kept."""
        self.state = TrainerState.load_from_json(str(checkpoint / folder.STATE))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        source = checkpoint if best is None else checkpoint.parent / Path(best).name
        self.view.load_state_dict(read_tensors(source / CHECKPOINT))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """transformers' own; a process whose numbers no checkpoint has draws new ones, as its number and step say."""
        if checkpoint is None:
            return
        rank, alone = self.args.process_index, self.args.world_size == 1
        if (Path(checkpoint) / ("rng_state.pth" if alone else f"rng_state_{rank}.pth")).is_file():
            super()._load_rng_state(checkpoint)
        else:
            torch.manual_seed(own_seed(self.args.seed, f"step {self.state.global_step}, process {rank}"))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """transformers' own; one that cannot be written to its end is taken away again.

        Raises:
            OSError: says why, and how to go on.
        """
        out = Path(self.args.output_dir or ".")
        place = out / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if folder.damage(place) is not None:
                shutil.rmtree(place, ignore_errors=True)
            free = shutil.disk_usage(out).free / GIB
            raise OSError(
                f"{place} could not be written: {error} ({free:.1f} GiB are free there). Earlier checkpoints are as "
                "they were; make room, then go on with --resume."
            ) from error

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the monitor has to say (docs/monitors.md) and the peak of memory."""
        if "loss" in logs:
            # A step that was skipped (fp16, gradients that are not finite) has no figures.
            figures = self.monitor.logs() if self._measured == self.state.global_step else {}
            figures |= self.monitor.levels(self.state.global_step, logs["loss"], self.state.log_history)
            logs |= {**figures, "peak_memory_gib": memory.peak() / GIB}
        super().log(logs, start_time)


def own_seed(seed: int, name: str) -> int:
    """The seed of what has that name, an adapter's start, say; whatever stands beside it."""
    return zlib.crc32(f"{seed} {name}".encode()) >> 1


def _own(view: PeftModel) -> list[nn.Parameter]:
    """The parameters that the view adds to its base."""
    return [*view.adapters.parameters(), *view.gates.parameters()]
