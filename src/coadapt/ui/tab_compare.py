"""The tab of several runs: a table, their curves in one picture, and the settings that differ."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from coadapt.training.palette import adapter_colors
from coadapt.ui import compared, drawing, runs, shown
from coadapt.ui.context import QUIET, Context, Remembered
from coadapt.ui.curves import HELD, TRAINING, spread
from coadapt.ui.tab_watch import labels

EVERY = 5.0
NONE_CHOSEN = "Choose two runs or more: they stand here beside each other, with the settings that differ."


@dataclass(frozen=True, kw_only=True)
class CompareTab:
    """The components of the tab."""

    chosen: gr.CheckboxGroup
    which: gr.Radio
    table: gr.HTML
    curves: gr.HTML
    differing: gr.HTML


def lay_out(context: Context) -> CompareTab:
    """Makes the components."""
    with gr.Row():
        with gr.Column(scale=2, min_width=220):
            chosen = gr.CheckboxGroup([], label="Runs, the latest first", elem_classes=["ca-list"])
            which = gr.Radio([HELD, TRAINING], value=HELD, label="Loss that is drawn")
        with gr.Column(scale=7, min_width=480):
            table = gr.HTML(shown.note(NONE_CHOSEN))
            curves = gr.HTML(padding=False)
            differing = gr.HTML()
    return CompareTab(chosen=chosen, which=which, table=table, curves=curves, differing=differing)


def wire(context: Context, tab: CompareTab) -> Remembered:
    """Says what happens."""
    kept, seen = context.kept("compared", {"runs": [], "which": HELD}), gr.State(None)
    outputs = [tab.chosen, tab.table, tab.curves, tab.differing, seen, kept]

    def refresh(chosen: list[str], which: str, before: list[Any] | None) -> Any:
        if before is None:  # what was chosen before the page was loaded is not there yet
            return [gr.skip() for _ in outputs]
        there = runs.found(context.runs)
        folders = {name: there[name] for name in chosen if name in there}
        listed = labels(there)
        found = [compared.summary(name, folder) for name, folder in folders.items()]
        now = [repr(listed), which, *map(repr, found)]
        if now == before:
            return [gr.skip() for _ in outputs]
        again = gr.CheckboxGroup(choices=listed)  # without a value: a person may have chosen another meanwhile
        said = {"runs": list(folders), "which": which}
        if not folders:
            return [again, shown.note(NONE_CHOSEN), "", "", now, said]
        rows = [one.cells() for one in found]
        return [
            again,
            shown.table(list(rows[0]), [list(row.values()) for row in rows]),
            _curves(folders, which),
            _differing(folders),
            now,
            said,
        ]

    inputs = [tab.chosen, tab.which, seen]
    changes: Any = [tab.chosen.change, tab.which.change, gr.Timer(EVERY).tick]
    gr.on(changes, refresh, inputs, outputs, trigger_mode="always_last", concurrency_limit=None, **QUIET)

    def restore(said: dict[str, Any]) -> list[Any]:
        there = runs.found(context.runs)
        before = [name for name in said.get("runs", []) if name in there]
        return [gr.CheckboxGroup(choices=labels(there), value=before), said.get("which", HELD), []]

    found = [tab.chosen, tab.which, seen]
    return Remembered(kept=kept, restore=restore, outputs=found, after=(refresh, inputs, outputs))


def _curves(folders: dict[str, Path], which: str) -> str:
    found = compared.curves(folders, which)
    colors = adapter_colors(folders)
    return drawing.plot(f"loss, {which}", found, colors, size=drawing.WIDE, logarithmic=spread(found))


def _differing(folders: dict[str, Path]) -> str:
    if len(folders) < 2:
        return shown.note("Choose another run, and the settings that differ stand here.")
    found = compared.differing(folders)
    if not found:
        return shown.note("All settings of these runs are the same.")
    rows = [[name, *values] for name, values in found.items()]
    return shown.label("settings that differ") + shown.table(["setting", *folders], rows)
