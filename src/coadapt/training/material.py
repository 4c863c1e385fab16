"""What a run trains on: each of its data sets read, recognised and made into examples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from coadapt.core.composition import trained_gates
from coadapt.core.routers import TaskRouter
from coadapt.data.by_task import TASK, Tasks, by_task
from coadapt.data.collate import Collator
from coadapt.data.columns import Told
from coadapt.data.images import ImageCollator, prepare_images
from coadapt.data.prepare import Plan, Prepared, has_tags, plan, prepare
from coadapt.data.segments import Framing
from coadapt.data.show import describe, one_image, one_sample
from coadapt.data.source import Source, read
from coadapt.data.tokens import pad_token
from coadapt.training.assemble import (
    Processor,
    check_sight,
    load_config,
    load_processor,
    longest,
    task_of_model,
)
from coadapt.training.datasets import DatasetSettings
from coadapt.training.mixing import temperature_weights
from coadapt.training.options import tasks_option
from coadapt.training.settings import RunConfig, Task
from coadapt.training.timetable import Timetable


@dataclass(frozen=True, kw_only=True)
class Part:
    """One data set, ready to be trained on."""

    settings: DatasetSettings
    found: Plan
    made: Prepared
    tasks: Tasks | None = None
    """Of its rows, where what they train tells tasks apart."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """All data sets of a run, by name; one that has `data` alone has one."""

    task: Task
    processor: Processor
    parts: Mapping[str, Part]

    @property
    def first(self) -> Part:
        """Of one data set, that one."""
        return next(iter(self.parts.values()))

    @property
    def classes(self) -> tuple[str, ...]:
        """Of a classification; the same in all data sets."""
        return self.first.found.classes

    @property
    def evaluates(self) -> bool:
        """Whether there are held-out rows."""
        return any(part.made.held_out is not None for part in self.parts.values())

    @property
    def framing(self) -> Framing | None:
        """How prompts are put to the model, where that is the same in all data sets; None: it is not, or images."""
        framings = [part.made.framing for part in self.parts.values()]
        return framings[0] if all(framing == framings[0] for framing in framings) else None

    def facts(self) -> dict[str, Any]:
        """What stands of the data beside the adapters."""
        each = {
            name: {
                "name": part.settings.data,
                "sha256": part.made.fingerprint,
                "format": part.found.form.name,
                "classes": part.found.classes,
            }
            for name, part in self.parts.items()
        }
        several = {"classes": self.classes, "datasets": each}
        facts: dict[str, Any] = {"data": several if len(each) > 1 else next(iter(each.values()))}
        if told := [part.tasks for part in self.parts.values() if part.tasks is not None]:
            facts["tasks"] = {"count": told[0].count, "names": told[0].names}
        if self.framing is not None:
            facts["prompt"] = {"style": self.framing.style, "separator": self.framing.separator}
        return facts

    @property
    def by_task(self) -> bool:
        """Whether rows say their task."""
        return any(part.tasks is not None for part in self.parts.values())

    def tasks(self, table: Timetable) -> dict[str, int]:
        """Adapter -> of how many tasks the rows are that it trains on, where they are told apart."""
        found = {d: part.tasks.count for d, part in self.parts.items() if part.tasks is not None}
        return {name: found[d] for d in found for name in table.uses(d)}

    def weights(self, temperature: float | None) -> list[float]:
        """What the rows of a batch are shared out by."""
        given = [part.settings.weight for part in self.parts.values()]
        if any(weight is not None for weight in given):
            return [1.0 if weight is None else weight for weight in given]
        return temperature_weights([len(part.made.train) for part in self.parts.values()], temperature or 1.0)

    def collator(self) -> Collator | ImageCollator:
        """Examples to a batch."""
        if isinstance(self.processor, PreTrainedTokenizerBase):
            return Collator(pad_token_id=pad_token(self.processor))
        return ImageCollator(processor=self.processor)

    def tell(self, console: Console) -> None:
        """Describes each data set, and shows one example of each."""
        for name, part in self.parts.items():
            if len(self.parts) > 1:
                console.print(Text(f"\n{name}", "bold"), Text(f"trains {part.settings.composition}", "dim"))
            console.print(describe(part.found, part.made))
            if part.tasks is not None:
                mine = part.tasks.column or part.tasks.names[part.tasks.number]
                console.print(Text(f"{part.tasks} (of these rows: {mine})"), soft_wrap=True)
            if isinstance(self.processor, PreTrainedTokenizerBase):
                console.print(Text("\none example, trained tokens between ⟦ and ⟧:", "dim"))
                console.print(one_sample(part.made.train[0], self.processor, part.found.classes), "")
            else:
                console.print(Text("\none example, its class between ⟦ and ⟧:", "dim"))
                console.print(one_image(part.made.train[0], part.found.classes), "")


def gather(run: RunConfig, table: Timetable) -> Material:
    """Reads all data sets, and makes their examples.

    Raises:
        ValueError: one cannot be read, has no known format, or does not go with the others or with the model.
    """
    rows = {name: read_rows(settings) for name, settings in run.sources.items()}
    config = load_config(run.model, run.revision)
    seen = {name: recognised(run, config, settings, *rows[name]) for name, settings in run.sources.items()}
    _check_alike(config, seen)
    task = next(iter(seen.values()))[0]
    check_sight(run.model, config, task)
    processor = load_processor(run.model, task, run.revision)
    tasks = tasks_of(run, table, {name: source.rows for name, (source, _) in rows.items()})
    parts = {
        name: Part(
            settings=settings,
            found=seen[name][1],
            made=_made(run, config, processor, task, settings, seen[name][1], table.uses(name), tasks.get(name)),
            tasks=tasks.get(name),
        )
        for name, settings in run.sources.items()
    }
    material = Material(task=task, processor=processor, parts=parts)
    _check_held_out(run, table, material)
    return material


def read_rows(settings: DatasetSettings) -> tuple[Source, Source | None]:
    """The rows of a data set, and those to evaluate on, where they are said."""
    rows = read(settings.data, settings.dataset_config)
    return rows, read(settings.eval_data, settings.dataset_config) if settings.eval_data else None


def columns(settings: DatasetSettings) -> Told:
    """The columns that the settings name."""
    return Told(
        text=settings.text_column,
        prompt=settings.prompt_column,
        completion=settings.completion_column,
        label=settings.label_column,
        image=settings.image_column,
    )


def recognised(
    run: RunConfig, config: PreTrainedConfig | None, settings: DatasetSettings, source: Source, held_out: Source | None
) -> tuple[Task, Plan]:
    """The task and the format of one data set; without a model's `config` the data alone decides."""
    told = columns(settings)
    task = run.task or (None if config is None else task_of_model(config))
    if run.task is None and task == "sequence-classification" and has_tags(source):
        task = "token-classification"  # an encoder can be either
    found = plan(source, held_out, told, task)
    decided: dict[str, Task] = {
        "labelled": "sequence-classification",
        "tagged": "token-classification",
        "pictured": "image-classification",
    }
    return task or decided.get(found.form.kind, "causal-lm"), found


def _check_alike(config: PreTrainedConfig, seen: Mapping[str, tuple[Task, Plan]]) -> None:
    """Raises a ValueError where the rows of data sets cannot go through one forward."""
    (first, (task, found)), *others = seen.items()
    for name, (other, its) in others:
        if other != task:
            raise ValueError(
                f"datasets: {first!r} is for {task}, {name!r} for {other}, and one run has one task. Train them in two "
                "runs, or say with task= (and the columns) what both are."
            )
        if its.classes != found.classes:
            raise ValueError(
                f"datasets: the rows of one run share the shape of the head, but {first!r} has the classes "
                f"{', '.join(found.classes)}, {name!r} {', '.join(its.classes)}. Train them in two runs."
            )
    if others and getattr(config, "output_router_logits", False):
        raise ValueError(
            "datasets: the model adds a loss over its routers (output_router_logits), which has no rows of its own. "
            "Switch it off in the model's config, or train the data sets one after another."
        )


def _made(
    run: RunConfig,
    config: PreTrainedConfig,
    processor: Processor,
    task: Task,
    settings: DatasetSettings,
    found: Plan,
    uses: list[str],
    tasks: Tasks | None,
) -> Prepared:
    if tasks is not None and tasks.column is not None:
        found = replace(found, form=found.form.beside(tasks.column, list(found.features)))
    split = run.eval_split if settings.eval_split is None else settings.eval_split
    if not isinstance(processor, PreTrainedTokenizerBase):
        if settings.max_length is not None:
            raise ValueError(f"max_length={settings.max_length} has no effect on images. Leave it out.")
        return prepare_images(found, eval_split=split, seed=run.seed, tasks=tasks)
    limit = longest(settings.max_length, [run.adapters[name] for name in uses], config, processor)
    return prepare(
        found,
        processor,
        task=task,
        max_length=limit,
        eval_split=split,
        seed=run.seed,
        completion_only_loss=bool(settings.completion_only_loss),
        separator=run.prompt_separator if settings.prompt_separator is None else settings.prompt_separator,
        tasks=tasks,
    )


def tasks_of(run: RunConfig, table: Timetable, rows: Mapping[str, Dataset]) -> dict[str, Tasks]:
    """The tasks of the data sets whose rows train something that tells tasks apart.

    Raises:
        ValueError: it does, and nothing says which rows are of which task, or there are more tasks than it knows; or
            a column is named, and it does not.
    """
    settings = run.sources
    known = {name: tasks_known(run, table, name) for name in rows}
    for name in rows:
        if not known[name] and settings[name].task_column is not None:
            raise ValueError(
                f"task_column={settings[name].task_column!r} has no effect: nothing that trains on {name} tells tasks "
                "apart. Leave it out, or use poly, mtl_lora, multitask_prompt_tuning or task_router(...)."
            )
    asking = {name: rows[name] for name in rows if known[name]}
    found = by_task(asking, {name: settings[name].task_column for name in asking})
    for name in asking:
        for who, count in known[name].items():
            if count is not None and count > 1 and name not in found:
                raise ValueError(
                    f"{who} tells {count} tasks apart, and nothing says which rows are of which: name the column that "
                    f"does (task_column), call it {TASK}, or give several data sets, one for each task."
                )
            if count is not None and name in found and found[name].count > count:
                raise ValueError(
                    f"{who} tells {count} tasks apart, and the rows are of {found[name]}. Give it as many."
                )
    return found


def refuse_tasks(materials: Iterable[Material | None], who: str) -> None:
    """Raises ValueError where rows are of several tasks, which `who` does not tell its model."""
    if any(material is not None and material.by_task for material in materials):
        raise ValueError(
            f"{who} knows no tasks. Give each adapter n_tasks=1 (num_tasks=1), so that its rows are of one; "
            "coadapt train takes several."
        )


def tasks_known(run: RunConfig, table: Timetable, dataset: str) -> dict[str, int | None]:
    """What tells tasks apart among all that a data set's rows use -> how many; None: as many as there are."""
    found: dict[str, int | None] = {}
    for name in table.uses(dataset):
        adapter = run.adapters[name]
        option = tasks_option(adapter.method)
        if option is not None and adapter.options.get(option) != 1:
            found[name] = adapter.options.get(option)
    for gate in trained_gates(table.compositions[dataset]):
        if isinstance(gate, TaskRouter):
            found[repr(gate)] = gate.num_tasks
    return found


def _check_held_out(run: RunConfig, table: Timetable, material: Material) -> None:
    """Raises a ValueError where early stopping has no rows to look at."""
    for name, adapter in run.adapters.items():
        patience = adapter.early_stopping_patience or run.early_stopping_patience
        mine = [material.parts[d] for d in table.of(name)]
        if patience is None or any(part.made.held_out is not None for part in mine):
            continue
        whose = f"adapters.{name}: " if run.stops_by_adapter else ""
        of = " and ".join(f"{part.made.tally.rows}" for part in mine)
        raise ValueError(
            f"{whose}early_stopping_patience={patience} watches the held-out loss, and nothing is held out: "
            f"eval_split={mine[0].settings.eval_split:g} of {of} rows. Give eval_data, or a larger eval_split."
        )
