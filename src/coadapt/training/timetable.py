"""Which adapter trains at which step, and when the rows of each data set are drawn.

An adapter trains from its `start_step` to its `stop_step`, without the latter. Before, it stands as it started; after,
as it ended; either way it is frozen, and takes part in what uses it. The rows of a data set are drawn from where the
last of its adapters starts to where the last has stopped. So `A >> B` with A until step 100 and B from step 100 on
trains B on top of a frozen A, and A needs a data set of its own before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coadapt.core import composition
from coadapt.core.composition import Node, as_node
from coadapt.training import processes
from coadapt.training.settings import RunConfig


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

    def held_out(self, dataset: str) -> str:
        """The name under which an evaluation has a data set's loss."""
        return "eval_loss" if len(self.compositions) == 1 else f"eval_{dataset}/loss"

    @property
    def staged(self) -> bool:
        """Whether something starts late or stops early."""
        return any(span != Span() for span in self.adapters.values())


def timetable(run: RunConfig) -> Timetable:
    """When everything trains.

    Raises:
        ValueError: a data set uses an adapter that there is not, none uses one, or one would train where no rows of its
            own are drawn; or several data sets are to train in several processes.
    """
    if len(run.sources) > 1 and processes.count() > 1:
        raise ValueError(
            f"datasets: {len(run.sources)} data sets train in one process, and here are {processes.count()}. Start one"
            ", or train the data sets one after another."
        )
    nodes = {
        name: as_node(list(run.adapters) if one.composition is None else one.composition)
        for name, one in run.sources.items()
    }
    spans = {name: Span(start=a.start_step or 0, stop=a.stop_step) for name, a in run.adapters.items()}
    _check_known(run, nodes, spans)
    drawn = {name: _drawn([spans[adapter] for adapter in composition.names(node)]) for name, node in nodes.items()}
    made = Timetable(compositions=nodes, adapters=spans, datasets=drawn)
    for adapter, span in spans.items():
        _check_rows(run, made, adapter, span)
    _check_idle(list(drawn.values()))
    last = max((span.stop for span in drawn.values() if span.stop is not None), default=run.max_steps)
    if processes.count() > 1 and run.max_steps > last:  # batches without rows cannot be shared out
        raise ValueError(f"max_steps={run.max_steps}: nothing would train from step {last} on. Give max_steps={last}.")
    return made


def _check_known(run: RunConfig, nodes: Mapping[str, Node], spans: Mapping[str, Span]) -> None:
    named = {f"datasets.{name}." if run.datasets else "": node for name, node in nodes.items()}
    for where, node in {**named, "": as_node(run.composition)}.items():
        try:
            composition.check_known(node, spans)
        except ValueError as error:
            raise ValueError(f"{where}composition: {error}") from error
        if len(nodes) > 1 and composition.trained_gates(node):
            raise ValueError(
                f"{where}composition={node!r} has gates or routers that train, which belong to one composition, and so "
                "to a run with one data set. Give numbers, or train them on one data set."
            )


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
            f"{adapter!r} is to train {span}, and to be frozen where its rows are drawn ("
            + ", ".join(f"{name}: {made.datasets[name]}" for name in mine)
            + f"; {said}). Rows are drawn once all adapters of their composition have started: change start_step, or "
            f"give {adapter!r} a data set of its own before."
        )


def _check_idle(drawn: Sequence[Span]) -> None:
    """Some data set is drawn at every step from the first to the last."""
    reached: int | None = 0
    for span in sorted(drawn, key=lambda span: span.start):
        if reached is not None and span.start > reached:
            raise ValueError(
                f"Nothing would train from step {reached} to step {span.start}: change start_step or stop_step."
            )
        reached = None if reached is None or span.stop is None else max(reached, span.stop)
