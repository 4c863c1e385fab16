"""Freezes and unfreezes the adapters of a run as its timetable says, and stops each at its best held-out loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from coadapt.core.adapter import start_from
from coadapt.model import PeftModel
from coadapt.training.timetable import Timetable

BEST = "best_adapters.safetensors"
"""File of a checkpoint: the best weights of the adapters that stop by themselves and have not yet."""


@dataclass
class Progress:
    """How far an adapter's early stopping is."""

    best: float | None = None
    best_step: int | None = None
    worse: int = 0
    """Evaluations in a row without a better loss."""
    stopped: int | None = None
    """The step at which it was stopped."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When an adapter is stopped: after so many evaluations in a row without a loss lower by more than `threshold`."""

    evaluations: int
    threshold: float = 0.0


class Course(TrainerCallback, ExportableState):
    """Freezes and unfreezes the adapters of a run, and keeps the best weights of those that stop by themselves.

    Args:
        init_from: adapter -> the one whose weights it takes over where it starts.
    """

    def __init__(
        self,
        view: PeftModel,
        plan: Timetable,
        patience: Mapping[str, Patience] | None = None,
        init_from: Mapping[str, str] | None = None,
    ) -> None:
        self.view, self.plan = view, plan
        self.patience = dict(patience or {})
        self.init_from = dict(init_from or {})
        self.progress: dict[str, Progress] = {name: Progress() for name in self.patience}
        self._best: dict[str, dict[str, Tensor]] = {}
        self._now: list[str] | None = None
        self.has_ended = False
        """Whether an evaluation ended the run: nothing trains any more, nor will."""

    @property
    def changes(self) -> bool:
        """Whether anything ever starts or stops within the run."""
        return self.plan.staged or bool(self.patience)

    # ---- step by step ------------------------------------------------------------------------------------------------

    def training(self, step: int) -> list[str]:
        """The adapters that train in this step."""
        return [name for name, span in self.plan.adapters.items() if step in span and not self._stopped(name)]

    def drawn(self, step: int) -> list[bool]:
        """Of each data set, whether its rows take part in this step."""
        trains = self.training(step)
        return [
            step in span and any(adapter in trains for adapter in self.plan.uses(name))
            for name, span in self.plan.datasets.items()
        ]

    def enter(self, step: int) -> list[str]:
        """Before a step: freezes what does not train in it, and gives what starts the weights that it starts from."""
        for name, source in self.init_from.items():
            # At the first step it has been done already, when it was attached.
            if step and step == self.plan.adapters[name].start:
                with torch.no_grad():
                    start_from(self.view.get_adapter(name), self.view.get_adapter(source))
        for name in [n for n in self._best if (stop := self.plan.adapters[n].stop) is not None and stop <= step]:
            self._put_back(name)
        trains = self.training(step)
        if self.changes and trains != self._now:
            self.view.freeze()
            if trains:
                self.view.unfreeze(*trains)
        self._now = trains
        return trains

    def _stopped(self, name: str) -> bool:
        return name in self.progress and self.progress[name].stopped is not None

    # ---- early stopping ----------------------------------------------------------------------------------------------

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **_: Any,
    ) -> None:
        # The step that was made last, which is not the one at which the run or a stage begins.
        for name in [n for n in self.training(state.global_step - 1) if n in self.patience]:
            of = [metrics[key] for d in self.plan.of(name) if (key := self.plan.held_out(d)) in metrics]
            self._judge(name, state.global_step, sum(of) / len(of))
        if self._ended(state.global_step):
            self.has_ended = True
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"

    def _judge(self, name: str, step: int, loss: float) -> None:
        """As transformers' early stopping: a better loss is kept, one that is better by enough starts the count."""
        progress, patience = self.progress[name], self.patience[name]
        enough = progress.best is None or progress.best - loss > patience.threshold
        if progress.best is None or loss < progress.best:
            progress.best, progress.best_step = loss, step
            own = self.view.get_adapter(name).state_dict()
            self._best[name] = {key: value.detach().to("cpu", copy=True) for key, value in own.items()}
        progress.worse = 0 if enough else progress.worse + 1
        if progress.worse >= patience.evaluations:
            progress.stopped = step
            self._put_back(name)

    def _put_back(self, name: str) -> None:
        if (best := self._best.pop(name, None)) is not None:
            self.view.get_adapter(name).load_state_dict(best)

    def _ended(self, step: int) -> bool:
        spans = self.plan.adapters.items()
        return all(self._stopped(name) or (span.stop is not None and span.stop <= step) for name, span in spans)

    def finish(self) -> None:
        """Every adapter that stops by itself gets its best weights; all are as free to train as before the run."""
        for name in list(self._best):
            self._put_back(name)
        if self.changes:
            self.view.unfreeze()
        self._now = None

    def told(self) -> dict[str, str]:
        """Of each adapter that stops by itself, which of its weights are kept, in words."""
        found: dict[str, str] = {}
        for name, p in self.progress.items():
            if p.best is not None:
                ended = "trained to its end" if p.stopped is None else f"stopped early, at step {p.stopped}"
                found[name] = f"{ended}; saved as it was at step {p.best_step}, its best (held-out loss {p.best:.4f})"
        return found

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What goes into a checkpoint's state; `save` writes the weights beside it."""
        progress = {name: dict(vars(p)) for name, p in self.progress.items()}
        return {"args": {}, "attributes": {"progress": progress, "ended": self.has_ended}}

    def save(self, checkpoint: Path) -> None:
        """Writes the best weights, where any are kept."""
        if self._best:
            tensors = {f"{name}/{key}": value for name, best in self._best.items() for key, value in best.items()}
            save_file(tensors, checkpoint / BEST)

    def load(self, checkpoint: Path) -> None:
        """Reads what `save` wrote."""
        self._best.clear()
        if (file := checkpoint / BEST).is_file():
            for name, tensor in load_file(file).items():
                adapter, _, key = name.partition("/")
                self._best.setdefault(adapter, {})[key] = tensor

    def take_up(self, state: TrainerState) -> None:
        """Goes on from where a checkpoint's state was."""
        kept = cast(dict[str, Any], state.stateful_callbacks)
        before = kept.setdefault(type(self).__name__, self.state())["attributes"]["progress"]
        self.progress = {name: Progress(**before.get(name, {})) for name in self.patience}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.take_up(state)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.finish()
