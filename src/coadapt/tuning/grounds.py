"""What comparisons and searches stand on: their folder, what a score is, what a candidate is before it is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from coadapt.data.prepare import CLASSIFYING
from coadapt.evaluation.metrics import Metric, chosen
from coadapt.formats.files import aside
from coadapt.training import machine
from coadapt.training.assemble import adapter_config, attach, load_base
from coadapt.training.datasets import starts_from
from coadapt.training.material import Material, gather, refuse_tasks
from coadapt.training.recommend import parameters
from coadapt.training.settings import RunConfig
from coadapt.training.timetable import timetable
from coadapt.tuning.plan import Trainings

TRIALS, DATA = "trials", "data"
"""Folders: of the trainings, and of the rows that they read."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What many trainings are for."""

    name: str
    verb: str
    file: str
    """Of their settings."""
    may_grow: tuple[str, ...]
    """Settings that may be other than when they began: trainings are added, and what there is stays true."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a candidate before it is trained."""

    run: RunConfig
    """With its default rates filled in."""
    parameters: int
    """Those that train, a new head among them."""
    total: int
    """All of the model with its adapters."""


# ---- the folder ------------------------------------------------------------------------------------------------------


def claim(config: Trainings, fingerprint: str, kind: Kind) -> None:
    """Raises a ValueError where the folder holds something else than these trainings; nothing is written."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file.")
    if not (out / kind.file).is_file():
        if out.is_dir() and any(out.iterdir()):
            there = ", ".join(sorted(path.name for path in out.iterdir())[:4])
            raise ValueError(
                f"out={str(out)!r} holds something else than a {kind.name} ({there}): choose another folder."
            )
        return
    before: Any = yaml.safe_load((out / kind.file).read_text("utf-8"))
    now = {**config.plain(), "data_sha256": fingerprint}
    if not isinstance(before, dict) or not isinstance(before.get("settings"), dict):
        raise ValueError(f"{out / kind.file} is damaged. Mend it, or choose another folder.")
    other = [
        (name, before["settings"].get(name), now["settings"].get(name))
        for name in sorted({*before["settings"], *now["settings"]})
        if before["settings"].get(name) != now["settings"].get(name)
    ]
    other += [
        (name, before.get(name), now[name])
        for name in now
        if name not in (*kind.may_grow, "settings") and before.get(name) != now[name]
    ]
    if other:
        shown = "\n".join(f"  {name}: {then!r} then, {here!r} now" for name, then, here in other)
        raise ValueError(
            f"{out} holds a {kind.name} with other settings, whose results would not be comparable:\n{shown}\n"
            f"Give the same (only {', '.join(kind.may_grow)} may differ), or another folder."
        )


def begin(config: Trainings, fingerprint: str, kind: Kind) -> None:
    """The folder as the trainings begin with it."""
    config.out.mkdir(parents=True, exist_ok=True)
    with aside(config.out / kind.file) as file:
        text = yaml.safe_dump({**config.plain(), "data_sha256": fingerprint}, sort_keys=False, allow_unicode=True)
        file.write_text(f"# coadapt {kind.verb} --config {kind.file} --out FOLDER\n{text}", "utf-8")


# ---- what is known before -------------------------------------------------------------------------------------------


def known_of(runs: Mapping[str, RunConfig], score: str | None) -> tuple[dict[str, Known], Metric, nn.Module]:
    """Each with its data read and attached to the base once: whether that can be, its size, its default rates.

    And the metric of the score, and the base.
    """
    materials = {name: _told(name, lambda run=run: gather(run, timetable(run))) for name, run in runs.items()}
    refuse_tasks(materials.values(), "A comparison")
    first, run = next(iter(materials.values())), next(iter(runs.values()))
    metric = metric_of(score, first, run)
    # What is left open depends on the virtual tokens of each; here all see the same.
    lengths = [m.first.made.max_length for m in materials.values()]
    common = {"task": first.task, "max_length": min((n for n in lengths if n is not None), default=None)}
    base = load_base(
        run.model,
        first.task,
        first.processor,
        dtype=run.dtype,
        revision=run.revision,
        classes=first.classes,
        quantisation=run.quantisation,
        device=machine.chosen(run.use_cpu),
    )
    size, found = parameters(base), dict[str, Known]()
    for name, one in runs.items():
        rated = one.with_rates(size).model_copy(update=common)
        trains, total = _told(name, lambda rated=rated: sizes(rated, base))
        found[name] = Known(run=rated, parameters=trains, total=total)
    return found, metric, base


def _told(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives; an error says of which candidate it is."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def metric_of(score: str | None, material: Material, run: RunConfig) -> Metric:
    """What rows are scored by: as told, else the accuracy of classes, and the loss of everything else.

    Raises:
        ValueError: there is no such score, or it has no meaning here.
    """
    usual = "accuracy" if material.task in CLASSIFYING else "loss"
    asks = material.task == "seq2seq" or (material.first.found.form.kind != "text" and run.completion_only_loss)
    return chosen([score or usual], material.task, asks)[0]


def sizes(run: RunConfig, base: nn.Module) -> tuple[int, int]:
    """(those that train, all), of the base with a candidate's adapters, which are taken away again."""
    assert run.task is not None
    configs = {name: adapter_config(name, one, run.task, run.revision) for name, one in run.adapters.items()}
    new_head = run.task == "image-classification"
    view = attach(base, configs, run.composition, new_head=new_head, order=starts_from(run))
    return view.get_nb_trainable_parameters()


def examples(run: RunConfig, files: dict[str, Path]) -> dict[str, int]:
    """Part -> its examples."""
    told = run.model_copy(update={"data": str(files["train"]), "eval_data": str(files["validation"])})
    scored = told.model_copy(update={"eval_data": str(files["held-out"])})
    made = [gather(r, timetable(r)).first.made for r in (told, scored)]
    return dict(zip(files, (len(made[0].train), *(len(m.held_out or ()) for m in made)), strict=True))
