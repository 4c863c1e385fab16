"""Several candidates in one run: each has its rows in every batch, and comes out as from a run of its own.

The law of joint training (docs/joint_training.md) makes them equal up to rounding, without dropout, as long as all
have the same rows, batch size, steps and schedule. What is measured of one run (memory, latency) cannot be told apart,
nor can a candidate be ended early without changing the others' batches; so neither is asked of such a run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from coadapt.core.composition import as_node, names
from coadapt.evaluation.metrics import Metric
from coadapt.evaluation.scoring import score
from coadapt.formats.files import aside, read_json
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.tuning.measure import exam, mean_of
from coadapt.tuning.trial import RESULT, SAID, Interrupted, Result, continued, lean


def fits(run: RunConfig) -> bool:
    """Whether a candidate can be trained beside others: without gates that train, and with the same draws."""
    drops = any("dropout" in option and value for one in run.adapters.values() for option, value in one.options.items())
    gated = run.composition is not None and "*" in run.composition
    return not drops and not gated and run.task != "image-classification"


def joined(runs: Mapping[str, RunConfig]) -> RunConfig:
    """One run of all; its adapters are called CANDIDATE_NAME, its data sets CANDIDATE."""
    first = next(iter(runs.values()))
    adapters, datasets = dict[str, Any](), dict[str, Any]()
    for label, run in runs.items():
        for name, one in run.adapters.items():
            adapters[f"{label}_{name}"] = one.model_dump(mode="json", exclude_none=True)
        composition = " + ".join(f"{label}_{name}" for name in names(as_node(run.composition or list(run.adapters))))
        datasets[label] = {"data": first.data, "eval_data": first.eval_data, "composition": composition}
    whole = first.plain()
    for name in ("data", "eval_data", "dataset_config", "composition", "adapters", "datasets"):
        whole.pop(name, None)
    own = {name: value for name, value in whole.items() if value is not None}
    run = RunConfig(**{**own, "datasets": datasets, "adapters": adapters})
    return run.model_copy(update={"per_device_train_batch_size": first.per_device_train_batch_size * len(runs)})


def conduct_together(runs: Mapping[str, RunConfig], place: Path, metric: Metric) -> dict[str, Result]:
    """Candidate -> its result, as far as a joint run has it: steps and validation score.

    Raises:
        Interrupted: a person stopped it.
        ValueError: they do not go together.
    """
    if (place / RESULT).is_file():
        return {label: Result(**one) for label, one in read_json(place / RESULT).items()}
    place.mkdir(parents=True, exist_ok=True)
    run = continued(joined(runs).model_copy(update={"output_dir": str(place)}))
    with (place / SAID).open("a", encoding="utf-8") as said:
        done = train(run, Console(file=said, width=100, highlight=False))
    if done.interrupted:
        raise Interrupted
    found: dict[str, dict[str, Any]] = {}
    for label, part in done.material.parts.items():
        asked = exam(done.view, done.material, [metric], run.per_device_eval_batch_size, part)
        values = score(done.view, asked, part.settings.composition)[metric.name]
        rows = {"values": values.values.tolist(), "weights": values.weights.tolist()}
        found[label] = {"steps": done.step, "validation_score": mean_of(values), **rows}
    with aside(place / RESULT) as file:
        file.write_text(json.dumps(found) + "\n", "utf-8")
    lean(place)
    return {label: Result(**one) for label, one in found.items()}
