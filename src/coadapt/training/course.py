"""Which adapter trains at which step: its start and its stop, and its early stopping at its best held-out loss.

An adapter trains from its `start_step` to its `stop_step`, without the latter. Before, it stands as it started; after,
as it ended; either way it is frozen, and takes part in what uses it. The rows of a data set are drawn from where the
last of its adapters starts to where the last has stopped. So `A >> B` with A until step 100 and B from step 100 on
trains B on top of a frozen A, and A needs a data set of its own before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from coadapt.core import composition
from coadapt.core.adapter import start_from
from coadapt.core.composition import Node, as_node
from coadapt.model import PeftModel
from coadapt.training.settings import RunConfig

BEST = "best_adapters.safetensors"
"""File of a checkpoint: the best weights of the adapters that stop by themselves and have not yet."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """From a step to another, without the last; None: to the end of the run."""

    start: int = 0
    stop: int | None = None

    def __contains__(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)

    def __str__(self) -> str:
        return f"from step {self.start} to {'the end' if self.stop is None else f'step {self.stop}'}"


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """Who uses what, and when; known before anything is loaded."""

    compositions: Mapping[str, Node]
    """Data set -> what its rows use."""
    adapters: Mapping[str, Span]
    datasets: Mapping[str, Span]
    """Data set -> when its rows are drawn."""

    def uses(self, dataset: str) -> list[str]:
        """The adapters of a data set."""
        return composition.names(self.compositions[dataset])

    def of(self, adapter: str) -> list[str]:
        """The data sets of an adapter."""
        return [name for name in self.compositions if adapter in self.uses(name)]

    @property
    def staged(self) -> bool:
        """Whether something starts late or stops early."""
        return any(span != Span() for span in self.adapters.values())


def timetable(run: RunConfig) -> Timetable:
    """When everything trains.

    Raises:
        ValueError: a data set uses an adapter that there is not, none uses one, or one would train where no rows of its
            own are drawn.
    """
    nodes = {
        name: as_node(list(run.adapters) if one.composition is None else one.composition)
        for name, one in run.sources.items()
    }
    spans = {name: Span(start=a.start_step or 0, stop=a.stop_step) for name, a in run.adapters.items()}
    for name, node in nodes.items():
        try:
            composition.check_known(node, spans)
        except ValueError as error:
            raise ValueError(f"{f'datasets.{name}.' if run.datasets else ''}composition: {error}") from error
    drawn = {name: _drawn([spans[adapter] for adapter in composition.names(node)]) for name, node in nodes.items()}
    made = Timetable(compositions=nodes, adapters=spans, datasets=drawn)
    for adapter, span in spans.items():
        _check_rows(run, made, adapter, span)
    _check_idle(list(drawn.values()))
    return made


def _drawn(spans: Sequence[Span]) -> Span:
    stops = [span.stop for span in spans]
    last = None if None in stops else max(stop for stop in stops if stop is not None)
    return Span(start=max(span.start for span in spans), stop=last)


def _check_rows(run: RunConfig, made: Timetable, adapter: str, span: Span) -> None:
    mine = made.of(adapter)
    if not mine and run.datasets:
        raise ValueError(
            f"No data set uses the adapter {adapter!r}, so it would not be trained: name it in the composition of one, "
            f"or leave it out. They use: {', '.join(f'{d}: {node!r}' for d, node in made.compositions.items())}."
        )
    if not mine:
        raise ValueError(
            f"composition={run.composition!r} leaves out {adapter}, which would not be trained. Name or remove it."
        )
    if not any(span.start in made.datasets[name] for name in mine):
        others = {a: made.adapters[a] for name in mine for a in made.uses(name) if a != adapter}
        said = ", ".join(f"{a} trains {s}" for a, s in others.items())
        raise ValueError(
            f"{adapter} is to train {span}, and to be frozen where its rows are drawn ("
            + ", ".join(f"{name}: {made.datasets[name]}" for name in mine)
            + f"; {said}). Rows are drawn once all adapters of their composition have started: change start_step, or "
            f"give {adapter} a data set of its own before."
        )


def _check_idle(drawn: Sequence[Span]) -> None:
    """Some data set is drawn at every step from the first to the last."""
    reached: int | None = 0
    for span in sorted(drawn, key=lambda span: span.start):
        if reached is not None and span.start > reached:
            raise ValueError(f"Nothing would train from step {reached} to step {span.start}: change start_step or stop_step.")
        reached = None if reached is None or span.stop is None else max(reached, span.stop)


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
        """Before a step: freezes what does not train in it, and lets what starts take over where it is to start from."""
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
            of = [metrics[key] for d in self.plan.of(name) if (key := held_out_key(d, self.plan)) in metrics]
            self._judge(name, state.global_step, sum(of) / len(of))
        if self._ended(state.global_step):
            self.has_ended = True
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"

    def _judge(self, name: str, step: int, loss: float) -> None:
        """As transformers' early stopping does: a better loss is kept, one that is better by enough starts the count."""
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


def held_out_key(dataset: str, plan: Timetable) -> str:
    """The name under which an evaluation has a data set's loss."""
    return "eval_loss" if len(plan.compositions) == 1 else f"eval_{dataset}/loss"
