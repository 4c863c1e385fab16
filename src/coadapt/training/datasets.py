"""What a run can be told of its data sets, and of when each adapter trains. Importing this file imports no torch."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from coadapt.config import did_you_mean
from coadapt.naming import check_name
from coadapt.training.vocabulary import refuse_unknown, renamed

OWN = ("data", "dataset_config", "eval_data")
"""Settings of a run with one data set that cannot be the default of several."""


class DatasetSettings(BaseModel):
    """One data set of a run. What is left out is the run's."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, defer_build=True)

    data: str
    """A file, a folder or a hub id, as the run's `data`."""
    composition: str | None = None
    """The adapter that its rows use, or several, as in `style + 0.5*task` or `lang >> task`."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of each batch, relative to the other weights; left out where others have one: 1."""
    dataset_config: str | None = None
    eval_data: str | None = None
    eval_split: float | None = Field(default=None, ge=0, lt=1)
    text_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    task_column: str | None = None
    prompt_separator: str | None = None
    completion_only_loss: bool | None = None
    max_length: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            raise ValueError(
                f"a data set is described by settings such as {{data: FILE, composition: task}}; {values!r}"
            )
        values = renamed(values)
        refuse_unknown(values, cls.model_fields, "a data set")
        if not values.get("composition"):
            raise ValueError("it needs a composition: the adapter that its rows use, as in composition: task")
        return values


def datasets_of(given: Any) -> dict[str, Any]:
    """Data sets by name. In a list each has its `name`, or that of its file.

    Raises:
        ValueError: it is neither names with settings nor a list of settings, or a name stands twice.
    """
    if isinstance(given, Mapping):
        return {str(name): settings for name, settings in given.items()}
    if not isinstance(given, list) or not all(isinstance(one, Mapping) and "data" in one for one in given):
        raise ValueError(f"datasets are names with settings, or a list of settings with `data` in each; got {given!r}")
    found: dict[str, Any] = {}
    for one in given:
        name = str(one.get("name") or PurePath(str(one["data"])).stem)
        if name in found:
            raise ValueError(f"datasets has {name!r} twice: give each a name, as in {{name: …, data: …}}")
        found[name] = {key: value for key, value in one.items() if key != "name"}
    return found


def check_datasets(run: Any) -> None:
    """Raises a ValueError where a run's `data`, `datasets` and their shares contradict each other."""
    if not run.datasets:
        if run.data is None and run.NEEDS_DATA:
            raise ValueError(f"data is missing: {type(run).model_fields['data'].description}")
        if run.mixing_temperature is not None:
            raise ValueError(
                f"mixing_temperature={run.mixing_temperature:g} has no effect on one data set: leave it out"
            )
        return
    beside = [name for name in OWN if getattr(run, name) is not None]
    if beside:
        raise ValueError(
            f"{', '.join(beside)} beside datasets: say it inside the data set that is meant, as in datasets.NAME.data"
        )
    weights = {name: one.weight for name, one in run.datasets.items() if one.weight is not None}
    for name in run.datasets:
        check_name(name)
    if weights and run.mixing_temperature is not None:
        raise ValueError(
            f"mixing_temperature={run.mixing_temperature:g} makes the shares out of the numbers of rows, and "
            f"datasets.{next(iter(weights))}.weight says one: give a temperature or weights, not both"
        )
    if len(run.datasets) == 1 and (weights or run.mixing_temperature is not None):
        raise ValueError("weight and mixing_temperature have no effect on one data set: leave them out")
    if run.per_device_train_batch_size < len(run.datasets):
        raise ValueError(
            f"per_device_train_batch_size={run.per_device_train_batch_size} has no room for {len(run.datasets)} data "
            f"sets, each of which has at least one row in each batch: set it to {len(run.datasets)} or more"
        )


def check_adapters(run: Any) -> None:
    """Raises a ValueError where what is said of when adapters begin and end has no meaning, or no effect."""
    for name, adapter in run.adapters.items():
        where, begin, end = f"adapters.{name}", adapter.start_step or 0, adapter.stop_step
        if end is not None and end <= begin:
            raise ValueError(f"{where}: stop_step={end} is not after start_step={begin}: it would never train")
        if 0 < run.max_steps <= begin:
            raise ValueError(
                f"{where}: start_step={begin} is not before the run's last step, max_steps={run.max_steps}: it would "
                "never train. Start it earlier, or set max_steps higher"
            )
        if end is not None and 0 < run.max_steps < end:
            raise ValueError(
                f"{where}: stop_step={end} has no effect: the run ends at max_steps={run.max_steps}. Leave it out"
            )
        if adapter.early_stopping_patience is not None and run.eval_strategy == "no":
            raise ValueError(
                f"{where}: early_stopping_patience={adapter.early_stopping_patience} counts evaluations, and "
                "eval_strategy=no makes none: set eval_steps, or eval_strategy to epoch"
            )
    begins_late = any(a.start_step for a in run.adapters.values())
    if run.fp16 and begins_late and run.stops_by_adapter:
        raise ValueError(
            "fp16 with early stopping and start_step: steps in which nothing trains have no gradients to scale. "
            "Use bf16, or leave one of them out"
        )
    starts_from(run)


def init_from(run: Any) -> dict[str, str]:
    """Adapter -> the one that it starts from."""
    found = {name: adapter.options.get("init_from") for name, adapter in run.adapters.items()}
    return {name: source for name, source in found.items() if source is not None}


def starts_from(run: Any) -> list[str]:
    """The adapters, each after the one that it starts from; as they stand where none does.

    Raises:
        ValueError: `init_from` names no adapter of the run, or adapters start from each other.
    """
    sources = init_from(run)
    for name, source in sources.items():
        if source not in run.adapters:
            raise ValueError(
                f"adapters.{name}: init_from={source!r} is no adapter of this run.{did_you_mean(source, run.adapters)} "
                f"There are: {', '.join(run.adapters)}."
            )
    order: list[str] = []
    while left := [name for name in run.adapters if name not in order]:
        ready = next((name for name in left if sources.get(name) in (None, *order)), None)
        if ready is None:
            raise ValueError(f"init_from goes in a circle: {', '.join(f'{n} from {sources[n]}' for n in left)}")
        order.append(ready)
    return order
