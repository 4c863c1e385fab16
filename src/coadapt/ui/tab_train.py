"""The tab of a training: what its form means, what it needs, and its start."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr

from coadapt.ui import form, launch, runs, shown
from coadapt.ui.context import COMPLAINTS, LOUD, QUIET, Context, Remembered, wrong_with
from coadapt.ui.tab_watch import labels
from coadapt.ui.train_fields import (
    FIRST,
    MOST,
    TrainTab,
    adapter_outputs,
    lay_out,
    read,
    shown_adapters,
    size_field,
    written,
)

__all__ = ["lay_out", "wire"]
ROWS = 3
"""First rows of the data that are shown."""
USUAL = ("lora", "prompt_tuning", "prefix_tuning", "bottleneck")
"""What a further adapter is, in this order."""


def wire(context: Context, tab: TrainTab, started: list[Any]) -> Remembered:
    """Says what happens; `started` are what a start changes elsewhere: the tabs, and the run that is watched."""
    kept = context.kept("form", FIRST)
    count, refused = gr.State(1), gr.State(None)
    everything, meaning = [count, *tab.inputs], [kept, tab.wrong, tab.command, tab.yaml]
    mean, meant = partial(_meaning, context), [refused, *everything]
    changes: Any = [component.change for component in (*tab.inputs, refused)]
    gr.on(changes, mean, meant, meaning, trigger_mode="always_last", queue=False, **QUIET)
    _wire_adapters(tab, count, lambda event: event.then(mean, meant, meaning, **QUIET))
    tab.estimate.click(_estimate, everything, tab.needs, **LOUD)
    tab.look.click(_look, everything, tab.data, **LOUD)
    tab.start.click(partial(_start, context), everything, [refused, *started], **LOUD)

    def restore(said: dict[str, Any]) -> list[Any]:
        values, adapters = said.get("values", {}), said.get("adapters") or FIRST["adapters"]
        proposed = {"model": context.model}
        fields = [values.get(n) or proposed.get(n) or None for n in tab.fields]
        return [len(adapters), said.get("name", ""), *fields, *shown_adapters(adapters)]

    outputs = [count, tab.name, *tab.fields.values(), *adapter_outputs(tab)]
    return Remembered(kept=kept, restore=restore, outputs=outputs, after=(mean, meant, meaning))


def _meaning(context: Context, refused: tuple[Any, str] | None, count: int, *values: Any) -> Any:
    """The form as it is kept, what is wrong with it, its command, its settings.

    Args:
        refused: the form that could not be started, and why: still so, as long as it is this one.
    """
    said = written(count, values)
    try:
        settings = read(said)
    except ValueError as error:
        return said, wrong_with(str(error)), "", ""
    wrong, folder = refused[1] if refused and refused[0] == said else "", context.runs / "NAME"
    try:
        folder = context.runs / form.run_name(str(said["name"] or ""), settings, context.runs)
        if settings.get("model") or settings.get("data"):  # nothing is wrong with a form that is empty
            form.checked(settings)
    except ValueError as error:
        wrong = str(error)
    return said, wrong_with(wrong), form.command(folder), form.as_yaml({**settings, "output_dir": str(folder)})


def _estimate(count: int, *values: Any) -> str:
    from coadapt.training.estimate import estimated

    try:
        return shown.estimate(estimated(form.planned(read(written(count, values)))))
    except COMPLAINTS as error:
        return shown.error(str(error))


def _look(count: int, *values: Any) -> str:
    from coadapt.training.data_check import check_data
    from coadapt.training.material import read_rows

    try:
        run = form.checked(read(written(count, values)))
        first = [r for one in run.sources.values() for r in islice(iter(read_rows(one)[0].rows), ROWS)]
        return shown.data(check_data(run), [dict(row) for row in first])
    except COMPLAINTS as error:
        return shown.error(str(error))


def _start(context: Context, count: int, *values: Any) -> Any:
    """The form with what is wrong with it, the tab to look at, the run to watch."""
    said = written(count, values)
    try:
        settings = read(said)
        run = form.checked(settings)
        check_there(str(run.model), [one.data for one in run.sources.values()])
        name = form.run_name(str(said["name"] or ""), settings, context.runs)
        launch.start(context.runs, name, settings)
    except COMPLAINTS as error:
        return (said, str(error)), gr.skip(), gr.skip()
    there = labels(runs.found(context.runs))
    return None, gr.Tabs(selected="watch"), gr.Radio(choices=there, value=name)


def check_there(model: str, data: Sequence[str | None]) -> None:
    """What can be known of the files before a process is started for them.

    Raises:
        ValueError, FileNotFoundError: they are not there, in the words that training has for it.
    """
    from coadapt.data.source import KINDS, read
    from coadapt.training.assemble import load_config

    if Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        load_config(model)
    for name in data:
        if name and not Path(name).expanduser().exists() and (Path(name).suffix in KINDS or name.count("/") != 1):
            read(name)


def _wire_adapters(tab: TrainTab, count: gr.State, after: Callable[[Any], Any]) -> None:
    outputs = [count, *adapter_outputs(tab)]
    inputs = [count, *tab.inputs]

    def add(count: int, *values: Any) -> list[Any]:
        adapters = written(count, values)["adapters"]
        fresh = next((m for m in USUAL if m not in [a["method"] for a in adapters]), "lora")
        adapters = [*adapters, {**FIRST["adapters"][0], "method": fresh}][:MOST]
        return [len(adapters), *shown_adapters(adapters)]

    after(tab.add.click(add, inputs, outputs, queue=False, **QUIET))
    for number, one in enumerate(tab.adapters):

        def remove(count: int, *values: Any, number: int = number) -> list[Any]:
            adapters = written(count, values)["adapters"]
            left = [a for n, a in enumerate(adapters) if n != number] or adapters
            return [len(left), *shown_adapters(left)]

        after(one.remove.click(remove, inputs, outputs, queue=False, **QUIET))
        one.method.change(size_field, one.method, one.size, queue=False, **QUIET)
