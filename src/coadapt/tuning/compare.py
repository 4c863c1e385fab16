"""Methods and mixes on one model and one data set: rates chosen, trainings repeated, held-out rows scored once.

For each candidate, in its folder under `trials`:

1. with a budget of time, a short training shows its speed, and with it how many steps the time is;
2. one training for each rate, with a seed of its own; the best by the loss on the validation rows is kept;
3. trainings with that rate and `seeds` other seeds, and after each the held-out rows are scored.

Every training is a run of `coadapt train`. One that has ended is never made again: its result is in its folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from coadapt.evaluation.metrics import Metric
from coadapt.training.mixing import Stream
from coadapt.training.settings import RunConfig
from coadapt.tuning.grounds import DATA, TRIALS, Kind, Known, begin, claim, examples, known_of
from coadapt.tuning.outcome import Compared, Entrant
from coadapt.tuning.plan import CompareConfig
from coadapt.tuning.report import write
from coadapt.tuning.splits import split
from coadapt.tuning.trial import Interrupted, Result, Trial, conduct, finished, prepared

COMPARISON = Kind(name="comparison", verb="compare", file="compare.yaml", may_grow=("methods", "candidates", "seeds"))
PACE_STEPS = 12
"""Of the training that shows the speed."""


def compare(config: CompareConfig, console: Console) -> Compared:
    """Trains what is still to be trained, and writes results.json and report.html; says on `console` what it does.

    Raises:
        ValueError: what does not fit, in the settings, the data or the model, before anything is written; or the folder
            holds a comparison with other settings.
        Interrupted: a person stopped it; what had ended is kept.
    """
    runs = config.runs
    first = next(iter(runs.values()))
    parts = split(first, config.validation_split)
    claim(config, parts.fingerprint, COMPARISON)
    known, metric = known_of(runs, config.score)[:2]
    begin(config, parts.fingerprint, COMPARISON)
    files = parts.write(config.out / DATA)
    rows = examples(next(iter(known.values())).run, files)
    progress = Progress(console, config, list(known))
    steps = {name: _steps(config, name, one.run, files, rows["train"], progress) for name, one in known.items()}
    done = [_entered(config, name, one, steps[name], files, metric, progress) for name, one in known.items()]
    found = Compared(config=config, metric=metric, rows=rows, entrants=done)
    write(found, config.out)
    return found


# ---- what is known before -------------------------------------------------------------------------------------------


def _steps(
    config: CompareConfig, name: str, run: RunConfig, files: dict[str, Path], rows: int, progress: "Progress"
) -> int:
    """Of each training of a candidate."""
    budget = config.limit
    if budget is None or budget.seconds is None:
        if run.max_steps > 0:
            return run.max_steps
        batch, accumulation = run.per_device_train_batch_size, run.gradient_accumulation_steps
        return Stream(rows=rows, batch=batch, accumulation=accumulation, seed=run.seed).end(run.num_train_epochs)
    quiet = {
        "eval_strategy": "no",
        "eval_steps": None,
        "early_stopping_patience": None,
        "early_stopping_threshold": 0.0,
    }
    short = prepared(run, files, steps=PACE_STEPS, seed=run.seed, factor=1.0).model_copy(update=quiet)
    pace = progress.conduct(Trial(run=short, place=config.out / TRIALS / name / "pace"), name, "its speed")
    if pace.seconds_per_step is None:
        raise ValueError(
            f"{name}: the speed of its steps could not be measured: {pace.failed}. To try again, take away "
            f"{config.out / TRIALS / name / 'pace'}."
        )
    return max(1, int(budget.seconds / pace.seconds_per_step))


# ---- the trainings ---------------------------------------------------------------------------------------------------


def _entered(
    config: CompareConfig,
    name: str,
    one: Known,
    steps: int,
    files: dict[str, Path],
    metric: Metric,
    progress: "Progress",
) -> Entrant:
    """A candidate with all of its results."""
    folder, seed = config.out / TRIALS / name, one.run.seed

    def trial(place: str, factor: float, seed: int, scored: bool) -> Trial:
        run = prepared(one.run, files, steps=steps, seed=seed, factor=factor)
        return Trial(run=run, place=folder / place, held_out=files["held-out"] if scored else None, metric=metric)

    tuned: dict[float, Result] = {}
    for factor in config.factors if config.rates > 1 else []:
        tuned[factor] = progress.conduct(
            trial(f"rate-{factor:.3g}", factor, seed, False), name, f"rates x {factor:.3g}"
        )
    best = min(tuned, key=lambda factor: tuned[factor].loss, default=1.0)
    repeats: dict[int, Result] = {}
    for own in range(seed + 1, seed + 1 + config.seeds):
        place = f"rate-{best:.3g}-seed-{own}"
        repeats[own] = progress.conduct(trial(place, best, own, True), name, f"seed {own}")
    return Entrant(
        name=name,
        run=one.run,
        parameters=one.parameters,
        total=one.total,
        steps=steps,
        tuned=tuned,
        chosen=best,
        repeats=repeats,
    )


class Progress:
    """Says what is trained, how far the comparison is, and what came of it."""

    def __init__(self, console: Console, config: CompareConfig, names: Sequence[str]) -> None:
        self.console = console
        pace = config.limit is not None and config.limit.seconds is not None
        tuned = config.rates if config.rates > 1 else 0
        self.total, self.number = len(names) * (pace + tuned + config.seeds), 0
        self.width = max(map(len, names))

    def conduct(self, trial: Trial, name: str, what: str, conduct: Callable[[Trial], Result] = conduct) -> Result:
        """The result of a training, told in a line."""
        self.number += 1
        kept = finished(trial.place) is not None
        head = f"{self.number:>{len(str(self.total))}}/{self.total}  {name:<{self.width}}  {what:<14}"
        try:
            found = conduct(trial)
        except (Interrupted, KeyboardInterrupt):
            self.console.print(Text(f"{head}  stopped"), soft_wrap=True)
            raise Interrupted from None
        self.console.print(Text(head + _came_to(found) + ("  (there already)" if kept else "")), soft_wrap=True)
        return found


def _came_to(found: Result) -> str:
    if found.failed:
        return f"  failed: {found.failed.splitlines()[0]}"
    loss = "" if found.validation_loss is None else f"  validation {found.validation_loss:.4f}"
    time = "" if found.seconds_per_step is None else f"  {found.seconds_per_step * 1000:.0f} ms a step"
    return loss + time
