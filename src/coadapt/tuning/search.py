"""The best combination of methods, sites, ranks, lengths, gates and rates on one data set, found by Optuna.

Akiba et al. 2019, arXiv:1907.10902; its sampler TPE, arXiv:1206.2944. A candidate is trained on the training rows and
judged by the validation rows. When the search has ended, the best one is trained once more with another seed, and only
then the held-out rows are scored: of many candidates the best is partly the luckiest.
"""

import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.text import Text
from torch import nn

from coadapt.evaluation.metrics import Metric
from coadapt.formats.files import aside
from coadapt.training.mixing import Stream
from coadapt.training.settings import RunConfig
from coadapt.tuning.candidates import candidates_of
from coadapt.tuning.grounds import DATA, TRIALS, Known, begin, claim, examples, known_of, sizes
from coadapt.tuning.space import Range, SearchConfig, draw, settings_of
from coadapt.tuning.splits import split
from coadapt.tuning.studies import SEARCH, Pruning, described, open_study, score_of
from coadapt.tuning.together import conduct_together, fits
from coadapt.tuning.trial import Interrupted, Result, Trial, conduct, prepared

BEST = "best.yaml"
USUAL_LENGTHS = 20
"""Virtual tokens that the longest example was found beside."""
MISSES = 50
"""Candidates in a row that cannot be trained, after which a search gives up."""

Running = tuple[int, RunConfig]
"""A trial's number and its run."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What all candidates stand on."""

    config: SearchConfig
    metric: Metric
    common: Mapping[str, Any]
    """Settings of every run."""
    known: Mapping[str, Known]
    """Method -> what it is alone."""
    base: nn.Module
    files: Mapping[str, Path]
    steps: int
    rows: Mapping[str, int]

    @property
    def rates(self) -> dict[str, float]:
        """Method -> its default learning rate on this base."""
        return {name: next(iter(one.run.peak_rates().values())) for name, one in self.known.items()}

    def run(self, settings: Mapping[str, Any]) -> RunConfig:
        """The run of a candidate's settings, on the files of this folder."""
        run = RunConfig(**settings)
        return prepared(run, dict(self.files), steps=self.steps, seed=run.seed, factor=1.0)


def search(config: SearchConfig, console: Console) -> "Search":
    """Trains candidates until the budget is used, and writes best.yaml; says on `console` what it does.

    Raises:
        ValueError: what does not fit, before anything is written; or the folder or the study is of another search.
        Interrupted: a person stopped it; what had ended is kept, and what had begun goes on.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)  # its words about its own options
    config.check()
    alone = candidates_of(config.common, config.methods)
    first = next(iter(alone.values()))
    parts = split(first, config.validation_split)
    claim(config, parts.fingerprint, SEARCH)
    known, metric, base = known_of(alone, config.score)
    length = _length(config, next(iter(known.values())).run.max_length)
    config.out.mkdir(parents=True, exist_ok=True)
    study = open_study(config, metric, parts.fingerprint)
    begin(config, parts.fingerprint, SEARCH)
    files = parts.write(config.out / DATA)
    run = next(iter(known.values())).run.model_copy(update={"max_length": length})
    rows = examples(run, files)
    common = {name: value for name, value in config.common.items() if name in RunConfig.model_fields}
    ground = Ground(
        config=config,
        metric=metric,
        common={**common, "task": run.task, **({} if length is None else {"max_length": length})},
        known=known,
        base=base,
        files=files,
        steps=_steps(run, rows["train"]),
        rows=rows,
    )
    found = Search(study, ground, console)
    found.go_on()
    found.conclude()
    return found


def _length(config: SearchConfig, longest: int | None) -> int | None:
    """The longest example beside as many virtual tokens as a mix can have."""
    if longest is None or "max_length" in config.settings:
        return longest
    most = []
    for options in config.spaces().values():
        values = options.get("num_virtual_tokens", [0])
        most.append(int(values.high if isinstance(values, Range) else max(values)))
    extra = sum(sorted(most)[-config.mixes :]) - USUAL_LENGTHS
    return max(longest - max(extra, 0), 2)


def _steps(run: RunConfig, rows: int) -> int:
    if run.max_steps > 0:
        return run.max_steps
    batch, accumulation = run.per_device_train_batch_size, run.gradient_accumulation_steps
    return Stream(rows=rows, batch=batch, accumulation=accumulation, seed=run.seed).end(run.num_train_epochs)


class Search:
    """A study and the trainings of this folder."""

    def __init__(self, study: Study, ground: Ground, console: Console) -> None:
        self.study, self.ground, self.console = study, ground, console
        self.config = ground.config
        self.owner = f"{socket.gethostname()}:{self.config.out.resolve()}"
        self.held_out: Result | None = None
        """Of the best candidate, trained with another seed."""

    # ---- candidates --------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Ends what had begun here, then trains new candidates while there is budget."""
        begun = [t for t in self.trials(TrialState.RUNNING) if t.user_attrs.get("owner") == self.owner]
        for trial in [t for t in begun if "run" not in t.user_attrs]:
            self.study.tell(trial.number, state=TrialState.FAIL)
        ready = [(t.number, self.ground.run(t.user_attrs["run"])) for t in begun if "run" in t.user_attrs]
        beside: dict[str, list[Running]] = {}
        for number, run in ready:
            beside.setdefault(self._trial(number).user_attrs.get("group") or str(number), []).append((number, run))
        for place, group in beside.items():
            self._conduct(place, group)
        while (left := self._left()) > 0:
            group = [self._ask() for _ in range(min(left, self.config.together))]
            if len(group) > 1 and all(fits(run) for _, run in group):
                place = f"{group[0][0]}-{group[-1][0]}"
                for number, _ in group:
                    self._attr(number, "group", place)
                self._conduct(place, group)
            else:
                for number, run in group:
                    self._conduct(str(number), [(number, run)])

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those in these states; all, where none is named."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    @property
    def trained(self) -> list[FrozenTrial]:
        """Those that were trained, to the end or until they were given up."""
        return [t for t in self.trials(TrialState.COMPLETE, TrialState.PRUNED) if "seconds" in t.user_attrs]

    def _left(self) -> int:
        """Trainings that there is still budget for."""
        spent = sum(t.user_attrs["seconds"] for t in self.trained if t.user_attrs.get("owner") == self.owner)
        if self.config.seconds is not None and spent >= self.config.seconds:
            return 0
        most = self.config.most
        return self.config.together if most is None else most - len(self.trained)

    def _ask(self) -> Running:
        """A new candidate that can be trained.

        Raises:
            ValueError: many in a row could not.
        """
        why = ""
        for _ in range(MISSES):
            trial = self.study.ask()
            trial.set_user_attr("owner", self.owner)
            drawn = draw(trial, self.config)
            settings = settings_of(drawn, self.ground.common, self.ground.rates)
            try:
                run = self.ground.run(settings)
                count, _ = sizes(run, self.ground.base)
            except (ValueError, TypeError) as error:
                why = str(error)
                trial.set_user_attr("refused", why)
                self.study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("parameters", count)
            most = self.config.max_parameters
            if most is not None and count > most:
                why = f"{count:,} parameters, more than max_parameters={most:,}"
                trial.set_user_attr("refused", why)
                self.study.tell(trial, state=TrialState.PRUNED)  # to the sampler as bad as what was given up
                continue
            trial.set_user_attr("run", settings)
            return trial.number, run
        raise ValueError(f"{MISSES} candidates in a row could not be trained, the last for this: {why}")

    # ---- trainings ---------------------------------------------------------------------------------------------------

    def _conduct(self, place: str, group: Sequence[Running]) -> None:
        begun = time.monotonic()
        try:
            results = self._results(place, group)
        except (Interrupted, KeyboardInterrupt):
            raise Interrupted from None
        seconds = (time.monotonic() - begun) / len(group)
        for number, result in results.items():
            self._attr(number, "seconds", seconds)
            self._tell(number, result)

    def _results(self, place: str, group: Sequence[Running]) -> dict[int, Result]:
        folder = self.config.out / TRIALS / place
        if "-" in place:
            try:
                found = conduct_together({f"c{n}": run for n, run in group}, folder, self.ground.metric)
                return {number: found[f"c{number}"] for number, _ in group}
            except ValueError as error:
                self.console.print(Text(f"trained one after another: {str(error).splitlines()[0]}", "dim"))
        return {number: self._alone(number, run) for number, run in group}

    def _alone(self, number: int, run: RunConfig) -> Result:
        known = self._trial(number).intermediate_values
        callbacks = [Pruning(self._live(number), known)] if self.config.pruned else []
        place = self.config.out / TRIALS / str(number)
        asked = Trial(run=run, place=place, held_out=self.ground.files["validation"], metric=self.ground.metric)
        return conduct(asked, callbacks)

    def _tell(self, number: int, result: Result) -> None:
        values = None if result.failed else [self._value(name, number, result) for name in self.config.objectives]
        if result.failed:
            self._attr(number, "failed", result.failed)
        given_up = self.config.pruned and result.steps < self.ground.steps
        if values is None or given_up:
            self.study.tell(number, state=TrialState.PRUNED)
        else:
            self.study.tell(number, values)
        shown = result.failed or (f"given up at step {result.steps}" if given_up else "")
        figures = shown or ", ".join(f"{n} {v:.5g}" for n, v in zip(self.config.objectives, values or (), strict=False))
        most = "" if self.config.most is None else f"/{self.config.most}"
        line = f"{len(self.trained)}{most}  {described(self._trial(number).params)}: {figures.splitlines()[0]}"
        self.console.print(Text(line), soft_wrap=True)

    def _value(self, name: str, number: int, result: Result) -> float:
        match name:
            case "parameters":
                return float(self._trial(number).user_attrs["parameters"])
            case "memory":
                return float(result.peak_bytes or 0)
            case "latency":
                assert result.latency is not None
                assert result.base_latency
                return result.latency / result.base_latency
            case _:
                return score_of(result)

    def _trial(self, number: int) -> FrozenTrial:
        return next(t for t in self.trials() if t.number == number)

    def _live(self, number: int) -> optuna.Trial:
        """A trial that goes on, whichever process began it."""
        return optuna.Trial(self.study, self._trial(number)._trial_id)

    def _attr(self, number: int, name: str, value: Any) -> None:
        self._live(number).set_user_attr(name, value)

    # ---- the end -----------------------------------------------------------------------------------------------------

    @property
    def front(self) -> list[FrozenTrial]:
        """The best, or with several objectives the best compromises, the best score first."""
        sign = -1 if self.ground.metric.higher_is_better else 1
        at = self.config.objectives.index(self.config.score)
        best = self.study.best_trials if self.trials(TrialState.COMPLETE) else []
        return sorted(best, key=lambda t: (sign * t.values[at], t.number))

    def conclude(self) -> None:
        """Writes the best as settings of `coadapt train`, trains it with another seed, and scores the held-out rows.

        Raises:
            RuntimeError: no training came to its end.
        """
        if not self.front:
            raise RuntimeError("No training came to its end, so there is no best one. See the folder's trials.")
        for place, trial in enumerate(self.front):
            file = BEST if place == 0 else f"best-{place + 1}.yaml"
            self._write(self.config.out / file, trial)
        best = self.front[0]
        run = self.ground.run(best.user_attrs["run"])
        again = run.model_copy(update={"seed": run.seed + 1, "adapters": _reseeded(run)})
        place = self.config.out / TRIALS / f"{best.number}-again"
        asked = Trial(run=again, place=place, held_out=self.ground.files["held-out"], metric=self.ground.metric)
        self.held_out = conduct(asked)

    def _write(self, file: Path, trial: FrozenTrial) -> None:
        values = ", ".join(f"{n} {v:.6g}" for n, v in zip(self.config.objectives, trial.values, strict=True))
        plain = {k: v for k, v in self.ground.run(trial.user_attrs["run"]).plain().items() if v not in (None, {})}
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        with aside(file) as part:
            head = f"# trial {trial.number} of the study {self.config.study}: {values} on the validation rows\n"
            part.write_text(f"{head}# coadapt train --config {file.name} --output-dir DIR\n{text}", "utf-8")


def _reseeded(run: RunConfig) -> dict[str, Any]:
    """The adapters with starts of another seed."""
    return {
        name: type(one)(**{**one.model_dump(exclude_none=True), "init_seed": one.options["init_seed"] + 1000})
        for name, one in run.adapters.items()
    }
