"""The tab of a training: the form, what it means, what it needs, and its start."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr

from coadapt.ui import form, launch, runs, shown
from coadapt.ui.context import LOUD, QUIET, Context, Remembered, wrong_with
from coadapt.ui.tab_watch import labels

MOST = 6
"""Adapters that the form has room for."""
ROWS = 3
"""First rows of the data that are shown."""
FIRST: dict[str, Any] = {
    "values": {},
    "adapters": [{"method": "lora", "name": "", "size": "", "learning_rate": "", "more": ""}],
}
"""The form as it is found the first time."""


@dataclass(frozen=True, kw_only=True)
class AdapterFields:
    """The components of one adapter."""

    group: gr.Group
    method: gr.Dropdown
    name: gr.Textbox
    size: gr.Textbox
    learning_rate: gr.Textbox
    more: gr.Textbox
    remove: gr.Button

    @property
    def inputs(self) -> list[Any]:
        return [self.method, self.name, self.size, self.learning_rate, self.more]


@dataclass(frozen=True, kw_only=True)
class TrainTab:
    """The components of the tab."""

    name: gr.Textbox
    fields: dict[str, Any]
    """Setting -> its component, in the order of `form.FIELDS`, `more` last."""
    adapters: list[AdapterFields]
    add: gr.Button
    wrong: gr.HTML
    command: gr.Code
    yaml: gr.Code
    look: gr.Button
    data: gr.HTML
    estimate: gr.Button
    needs: gr.HTML
    start: gr.Button

    @property
    def inputs(self) -> list[Any]:
        return [self.name, *self.fields.values(), *(c for a in self.adapters for c in a.inputs)]


def lay_out(context: Context) -> TrainTab:
    """Makes the components."""
    with gr.Row():
        with gr.Column(scale=6, min_width=460):
            fields = _sources()
            adapters, add = _adapters()
            fields |= _course()
        with gr.Column(scale=5, min_width=380):
            wrong = gr.HTML(visible=False)
            with gr.Row():
                estimate = gr.Button("Estimate", size="md")
                look = gr.Button("Look at the data", size="md")
                start = gr.Button("Start", variant="primary", size="md")
            name = gr.Textbox(label="Name of the run", placeholder="left out: after model and adapters", max_lines=1)
            needs = gr.HTML(shown.note("Estimate says what memory and time a step needs. Nothing is loaded for it."))
            data = gr.HTML(shown.note("Look at the data shows how its rows are read, and what is wrong with them."))
            command = gr.Code(label="Command", language="shell", lines=1, wrap_lines=True, interactive=False)
            yaml = gr.Code(label="Settings", language="yaml", lines=8, interactive=False)
    order = {n: fields[n] for n in (*form.FIELDS, "more")}
    return TrainTab(
        name=name,
        fields=order,
        adapters=adapters,
        add=add,
        wrong=wrong,
        command=command,
        yaml=yaml,
        look=look,
        data=data,
        estimate=estimate,
        needs=needs,
        start=start,
    )


def _sources() -> dict[str, Any]:
    return {
        "model": gr.Textbox(label="Model", placeholder="a folder, or a hub id", max_lines=1),
        "data": gr.Textbox(
            label="Data", placeholder="a jsonl, json, csv, tsv, parquet or txt file, a folder, or a hub id", max_lines=1
        ),
        "eval_data": gr.Textbox(
            label="Held-out data", placeholder="left out: 5 % of the rows are held out", max_lines=1
        ),
    }


def _adapters() -> tuple[list[AdapterFields], gr.Button]:
    made: list[AdapterFields] = []
    for number in range(MOST):
        with gr.Group(visible=number == 0) as group:
            with gr.Row():
                method = gr.Dropdown(form.choices(), value="lora", label="Method", scale=5, min_width=170)
                size = gr.Textbox(
                    label=form.size_option("lora") or "size",
                    placeholder=form.default_size("lora"),
                    max_lines=1,
                    scale=3,
                    min_width=110,
                )
                rate = gr.Textbox(
                    label="Learning rate", placeholder="the tested one", max_lines=1, scale=3, min_width=110
                )
            with gr.Row(equal_height=True):
                name = gr.Textbox(label="Name", placeholder="after its method", max_lines=1, scale=5, min_width=170)
                more = gr.Textbox(
                    label="Other settings", placeholder="name=value, by spaces", max_lines=3, scale=6, min_width=150
                )
                remove = gr.Button("Remove", size="sm", scale=1, min_width=90)
        made.append(
            AdapterFields(
                group=group, method=method, name=name, size=size, learning_rate=rate, more=more, remove=remove
            )
        )
    return made, gr.Button("Add an adapter", size="sm")


def _course() -> dict[str, Any]:
    fields: dict[str, Any] = {
        "composition": gr.Textbox(
            label="Composition", placeholder='how they take part: "task + 0.5*style"; left out, their sum', max_lines=2
        )
    }
    with gr.Row():
        for name, label, default in (
            ("num_train_epochs", "Epochs", "3"),
            ("max_steps", "or steps", "by epochs"),
            ("per_device_train_batch_size", "Batch", "8"),
            ("max_length", "Longest row, tokens", "1024, or what fits"),
        ):
            fields[name] = gr.Textbox(label=label, placeholder=default, max_lines=1, min_width=110)
    with gr.Accordion("More", open=False):
        with gr.Row():
            for name, label, default in (
                ("logging_steps", "Steps between lines of the log", "10"),
                ("eval_steps", "Steps between evaluations", "one an epoch"),
                ("seed", "Seed", "42"),
            ):
                fields[name] = gr.Textbox(label=label, placeholder=default, max_lines=1, min_width=110)
        with gr.Row():
            for name, label in (
                ("load_in_4bit", "Base in 4 bits"),
                ("gradient_checkpointing", "Less memory, more time"),
                ("use_cpu", "On the CPU"),
            ):
                fields[name] = gr.Checkbox(label=label, min_width=110)
        fields["more"] = gr.Textbox(
            label="Other settings",
            placeholder="as on the command line: lr_scheduler_type=cosine early_stopping_patience=3",
            max_lines=4,
        )
    return fields


# ---- what happens ----------------------------------------------------------------------------------------------------


def written(count: int, values: Sequence[Any]) -> dict[str, Any]:
    """The form as plain values, from those of its components in their order."""
    rest = iter(values)
    name = next(rest)
    fields = dict(zip((*form.FIELDS, "more"), islice(rest, len(form.FIELDS) + 1), strict=True))
    names = ("method", "name", "size", "learning_rate", "more")
    adapters = [dict(zip(names, islice(rest, len(names)), strict=True)) for _ in range(MOST)]
    return {"name": name, "values": fields, "adapters": adapters[:count]}


def read(said: dict[str, Any]) -> dict[str, Any]:
    """The settings of a form. Raises ValueError where something in it cannot be read."""
    return form.settings(said["values"], [form.AdapterForm(**a) for a in said["adapters"]])


def wire(context: Context, tab: TrainTab, started: list[Any]) -> Remembered:
    """Says what happens; `started` are what a start changes elsewhere: the tabs, and the run that is watched."""
    kept = context.kept("form", FIRST)
    count = gr.State(1)
    meaning = [kept, tab.wrong, tab.command, tab.yaml]

    def mean(count: int, *values: Any) -> Any:
        said = written(count, values)
        try:
            settings = read(said)
        except ValueError as error:
            return said, wrong_with(str(error)), "", ""
        wrong, folder = wrong_with(""), context.runs / "NAME"
        try:
            folder = context.runs / form.run_name(str(said["name"] or ""), settings, context.runs)
            if settings.get("model") or settings.get("data"):  # nothing is wrong with a form that is empty
                form.checked(settings)
        except ValueError as error:
            wrong = wrong_with(str(error))
        return said, wrong, form.command(folder), form.as_yaml({**settings, "output_dir": str(folder)})

    everything = [count, *tab.inputs]
    changes: Any = [component.change for component in tab.inputs]
    gr.on(changes, mean, everything, meaning, trigger_mode="always_last", queue=False, **QUIET)
    _wire_adapters(tab, count, lambda event: event.then(mean, everything, meaning, **QUIET))

    def restore(said: dict[str, Any]) -> list[Any]:
        values, adapters = said.get("values", {}), said.get("adapters") or FIRST["adapters"]
        proposed = {"model": context.model}
        fields = [values.get(n) or proposed.get(n) or None for n in tab.fields]
        return [len(adapters), said.get("name", ""), *fields, *_shown_adapters(adapters)]

    outputs = [count, tab.name, *tab.fields.values(), *_adapter_outputs(tab)]

    def estimate(count: int, *values: Any) -> str:
        from coadapt.training.estimate import estimated

        try:
            return shown.estimate(estimated(form.planned(read(written(count, values)))))
        except (ValueError, OSError) as error:
            return shown.error(str(error))

    def look(count: int, *values: Any) -> str:
        from coadapt.training.data_check import check_data
        from coadapt.training.material import read_rows

        try:
            run = form.checked(read(written(count, values)))
            first = [r for one in run.sources.values() for r in islice(iter(read_rows(one)[0].rows), ROWS)]
            return shown.data(check_data(run), [dict(row) for row in first])
        except (ValueError, OSError) as error:
            return shown.error(str(error))

    def start(count: int, *values: Any) -> Any:
        said = written(count, values)
        try:
            settings = read(said)
            run = form.checked(settings)
            check_there(str(run.model), [one.data for one in run.sources.values()])
            name = form.run_name(str(said["name"] or ""), settings, context.runs)
            launch.start(context.runs, name, settings)
        except (ValueError, OSError) as error:
            return [wrong_with(str(error)), *(gr.skip() for _ in started)]
        return [
            wrong_with(""),
            gr.Tabs(selected="watch"),
            gr.Radio(choices=labels(runs.found(context.runs)), value=name),
        ]

    tab.estimate.click(estimate, everything, tab.needs, **LOUD)
    tab.look.click(look, everything, tab.data, **LOUD)
    tab.start.click(start, everything, [tab.wrong, *started], **LOUD)
    return Remembered(kept=kept, restore=restore, outputs=outputs, after=(mean, everything, meaning))


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


def _adapter_outputs(tab: TrainTab) -> list[Any]:
    return [c for a in tab.adapters for c in (*a.inputs, a.group)]


def _shown_adapters(adapters: Sequence[dict[str, Any]]) -> list[Any]:
    """What the components of all adapters show for these."""
    found: list[Any] = []
    for number in range(MOST):
        there = number < len(adapters)
        one = adapters[number] if there else FIRST["adapters"][0]
        found += [one["method"], one["name"], _size(one["method"], one["size"]), one["learning_rate"], one["more"]]
        found.append(gr.Group(visible=there))
    return found


def _size(method: str, value: Any = None) -> Any:
    option = form.size_option(method)
    more = {} if value is None else {"value": value}
    return gr.Textbox(label=option or "size", placeholder=form.default_size(method), visible=option is not None, **more)


def _wire_adapters(tab: TrainTab, count: gr.State, after: Any) -> None:
    outputs = [count, *_adapter_outputs(tab)]
    inputs = [count, *tab.inputs]

    def add(count: int, *values: Any) -> list[Any]:
        adapters = written(count, values)["adapters"]
        usual = ["lora", "prompt_tuning", "prefix_tuning", "bottleneck"]
        fresh = next((m for m in usual if m not in [a["method"] for a in adapters]), "lora")
        adapters = [*adapters, {**FIRST["adapters"][0], "method": fresh}][:MOST]
        return [len(adapters), *_shown_adapters(adapters)]

    after(tab.add.click(add, inputs, outputs, queue=False, **QUIET))
    for number, one in enumerate(tab.adapters):

        def remove(count: int, *values: Any, number: int = number) -> list[Any]:
            adapters = written(count, values)["adapters"]
            left = [a for n, a in enumerate(adapters) if n != number] or adapters
            return [len(left), *_shown_adapters(left)]

        after(one.remove.click(remove, inputs, outputs, queue=False, **QUIET))
        one.method.change(_size, one.method, one.size, queue=False, **QUIET)
