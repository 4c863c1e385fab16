"""The components of a training's form, and what stands in them as plain values."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import gradio as gr

from coadapt.ui import form, shown

MOST = 6
"""Adapters that the form has room for."""
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


def lay_out() -> TrainTab:
    """Makes the components."""
    with gr.Row():
        with gr.Column(scale=6, min_width=460):
            fields = _sources()
            adapters, add = _adapters()
            fields |= _course()
            name = gr.Textbox(label="Name of the run", placeholder="left out: after model and adapters", max_lines=1)
            command = gr.Code(
                label="Command", language="shell", lines=1, wrap_lines=True, interactive=False, show_line_numbers=False
            )
            yaml = gr.Code(label="Settings", language="yaml", lines=8, interactive=False, show_line_numbers=False)
        with gr.Column(scale=5, min_width=380):
            wrong = gr.HTML(visible=False)
            with gr.Row():
                estimate = gr.Button("Estimate", size="md")
                look = gr.Button("Look at the data", size="md")
                start = gr.Button("Start", variant="primary", size="md")
            needs = gr.HTML(shown.note("Estimate says what memory and time a step needs. Nothing is loaded for it."))
            data = gr.HTML(shown.note("Look at the data shows how its rows are read, and what is wrong with them."))
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
            ("max_length", "Longest row", "in tokens"),
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


# ---- what stands in them ---------------------------------------------------------------------------------------------


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


def adapter_outputs(tab: TrainTab) -> list[Any]:
    """The components that `shown_adapters` gives values for."""
    return [c for a in tab.adapters for c in (*a.inputs, a.group)]


def shown_adapters(adapters: Sequence[dict[str, Any]]) -> list[Any]:
    """What the components of all adapters show for these."""
    found: list[Any] = []
    for number in range(MOST):
        there = number < len(adapters)
        one = adapters[number] if there else FIRST["adapters"][0]
        found += [one["method"], one["name"], size_field(one["method"], one["size"]), one["learning_rate"], one["more"]]
        found.append(gr.Group(visible=there))
    return found


def size_field(method: str, value: Any = None) -> Any:
    """The field of an adapter's size, named by the option of its method; hidden where there is none."""
    option = form.size_option(method)
    more = {} if value is None else {"value": value}
    return gr.Textbox(label=option or "size", placeholder=form.default_size(method), visible=option is not None, **more)
