"""One training among many: a run like any other, and beside its folder's files what it came to."""

import gc
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from coadapt.evaluation.metrics import Metric
from coadapt.evaluation.scoring import score
from coadapt.formats.files import aside, read_json
from coadapt.training import folder
from coadapt.training.log import read_log
from coadapt.training.material import gather
from coadapt.training.results import Outcome
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.training.timetable import timetable
from coadapt.tuning.measure import Meter, exam, held_out_loss, latency

RESULT, SAID, MEASURED = "result.json", "train.log", "measured.json"
CURVE = 8
"""Evaluations of a training, where nothing else is said."""


class Interrupted(Exception):
    """A person stopped a training; it goes on from there."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training and what is asked of it."""

    run: RunConfig
    place: Path
    held_out: Path | None = None
    """Rows to score when it has ended; None: it is not scored."""
    metric: Metric | None = None
    """What the score is."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training came to. Figures that were not measured are None."""

    failed: str | None = None
    """Why it came to nothing: a loss that is no number, memory that is not there."""
    steps: int = 0
    validation_loss: float | None = None
    curve: list[list[float]] | None = None
    """(step, validation loss)"""
    seconds_per_step: float | None = None
    peak_bytes: int | None = None
    rates: dict[str, float] | None = None
    """Adapter -> learning rate."""
    latency: float | None = None
    base_latency: float | None = None
    validation_score: float | None = None
    """The score of the validation rows, where a search asks for it."""
    values: list[float] | None = None
    """The score of each held-out row."""
    weights: list[float] | None = None
    """How much each row counts: by its tokens, or all alike."""

    @property
    def loss(self) -> float:
        """The validation loss; infinite where there is none."""
        return math.inf if self.validation_loss is None or self.failed else self.validation_loss


def finished(place: Path) -> Result | None:
    """What the training in a folder came to; None where it has not ended."""
    file = place / RESULT
    return Result(**read_json(file)) if file.is_file() else None


def conduct(trial: Trial, callbacks: Sequence[TrainerCallback] = ()) -> Result:
    """The result of a training: as it is written, else after it has been trained.

    Raises:
        Interrupted: a person stopped it.
        ValueError: the folder has the result of a training with other settings.
    """
    if (known := finished(trial.place)) is not None:
        _check_same(trial)
        return known
    trial.place.mkdir(parents=True, exist_ok=True)
    try:
        result = _trained(trial, callbacks)
    except (ValueError, torch.OutOfMemoryError) as error:
        result = Result(failed=str(error))
    with aside(trial.place / RESULT) as file:
        file.write_text(json.dumps(asdict(result)) + "\n", "utf-8")
    lean(trial.place)
    return result


def _check_same(trial: Trial) -> None:
    """Raises a ValueError where a result is of a candidate that had the same name and was another."""
    if (trial.place / folder.RUN).is_file():
        try:
            folder.same_run(trial.place, trial.run)
        except ValueError as error:
            told = str(error).partition("\n")[2] or str(error)
            raise ValueError(
                f"{trial.place} has the result of a training with other settings:\n{told}\nTake the folder away, or "
                "give the candidate another name."
            ) from error


def _trained(trial: Trial, callbacks: Sequence[TrainerCallback]) -> Result:
    run, meter = (
        continued(trial.run.model_copy(update={"output_dir": str(trial.place)})),
        Meter(trial.place / MEASURED),
    )
    with (trial.place / SAID).open("a", encoding="utf-8") as said, meter:
        done = train(run, Console(file=said, width=100, highlight=False), callbacks=(meter, *callbacks))
    if done.interrupted:
        raise Interrupted
    found = _figures(trial, done, meter.read())
    del done
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Result(**found)


def _figures(trial: Trial, done: Outcome, meter: Meter) -> dict[str, Any]:
    log = read_log(trial.place / folder.METRICS)
    size = trial.run.per_device_eval_batch_size
    chosen = held_out_loss(done.view, done.material, size)  # of what is saved, which need not be the last evaluation
    curve = [[line["step"], line["eval/loss"]] for line in log if "eval/loss" in line]
    found: dict[str, Any] = {
        "steps": done.step,
        "validation_loss": chosen,
        "curve": [*(point for point in curve if point[0] < done.step), [done.step, chosen]],
        "seconds_per_step": meter.seconds_per_step,
        "peak_bytes": meter.peak or None,
        "rates": trial.run.peak_rates(),
    }
    if trial.held_out is None or trial.metric is None:
        return found
    scored = trial.run.model_copy(update={"eval_data": str(trial.held_out)})
    material = gather(scored, timetable(scored))
    adapted, plain = latency(done.view, material, size)
    rows = score(done.view, exam(done.view, material, [trial.metric], size), done.view.composition)[trial.metric.name]
    scored_rows = {"values": rows.values.tolist(), "weights": rows.weights.tolist()}
    return {**found, "latency": adapted, "base_latency": plain, **scored_rows}


def continued(run: RunConfig) -> RunConfig:
    """The run as it goes on from what is there, or replaces what cannot be gone on with."""
    again = run.model_copy(update={"resume": True})
    try:
        folder.claim(folder.output_dir(again), again)
    except ValueError:
        return run.model_copy(update={"overwrite_output_dir": True})
    return again


def lean(place: Path) -> None:
    """Checkpoints are there to go on from, and nothing is left to go on with."""
    for name in ("best", "last", MEASURED):
        (place / name).unlink(missing_ok=True)
    for checkpoint in place.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def prepared(run: RunConfig, files: dict[str, Path], *, steps: int, seed: int, factor: float) -> RunConfig:
    """The run of a trial: on these files, so many steps, this seed, its rates (which are known) times `factor`."""
    told = run.model_fields_set
    update: dict[str, Any] = {
        "data": str(files["train"]),
        "eval_data": str(files["validation"]),
        "dataset_config": None,
        "eval_split": RunConfig.model_fields["eval_split"].default,  # all that is held out is in eval_data
        "seed": seed,
        "max_steps": steps,
        "adapters": {
            name: one.model_copy(update={"learning_rate": rate * factor})
            for (name, one), rate in zip(run.adapters.items(), run.peak_rates().values(), strict=True)
        },
    }
    if run.gates_learning_rate is not None:  # left out, it is the largest of the adapters'
        update["gates_learning_rate"] = run.gates_learning_rate * factor
    if not {"eval_strategy", "eval_steps", "early_stopping_patience"} & told:
        update |= {"eval_strategy": "steps", "eval_steps": max(1, steps // CURVE)}
    if not {"logging_steps"} & told:
        update["logging_steps"] = max(1, steps // 40)
    if "save_total_limit" not in told:
        update["save_total_limit"] = 1
    return run.model_copy(update=update)
