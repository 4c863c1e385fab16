"""The tab of the runs: which there are, how one stands, its curves and its log."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from coadapt.training.presence import process_of
from coadapt.training.units import size
from coadapt.ui import curves, drawing, launch, runs, shown
from coadapt.ui.compared import NOTHING, summary
from coadapt.ui.context import LOUD, QUIET, Context, Remembered, wrong_with

EVERY = 2.0
"""Seconds between two looks at the files."""
EMPTY = "There is no run in {} yet. Start one in Train, or with: coadapt train --output-dir {}/NAME …"


@dataclass(frozen=True, kw_only=True)
class WatchTab:
    """The components of the tab."""

    chosen: gr.Radio
    empty: gr.HTML
    whole: gr.Row
    standing: gr.HTML
    stop: gr.Button
    go_on: gr.Button
    wrong: gr.HTML
    curves: gr.HTML
    log: gr.Textbox


def pictures(folder: Path) -> str:
    """The curves of a run."""
    log = runs.lines(folder)
    adapters = list(runs.settings(folder).get("adapters") or {})
    loss, memory = curves.loss(log), curves.memory(log)
    small = [
        drawing.plot(title, found, curves.colors(found, adapters), logarithmic=logarithmic)
        for figure, (title, logarithmic) in curves.PANELS.items()
        if (found := curves.panel(log, figure))
    ]
    small.append(drawing.plot("memory, GiB", memory, curves.colors(memory)))
    wide = drawing.plot("loss", loss, curves.colors(loss), size=drawing.WIDE, logarithmic=curves.spread(loss))
    return f'{wide}<div class="ca-plots">{"".join(small)}</div>' if wide else ""


def lay_out(context: Context) -> WatchTab:
    """Makes the components."""
    empty = gr.HTML(shown.note(EMPTY.format(context.runs, context.runs)))
    with gr.Row(visible=False) as whole:
        with gr.Column(scale=2, min_width=220):
            chosen = gr.Radio([], label="Runs, the latest first", elem_classes=["ca-list"])
        with gr.Column(scale=7, min_width=480):
            standing = gr.HTML()
            stop = gr.Button("Stop after this step", size="sm", visible=False, elem_classes=["ca-act"])
            go_on = gr.Button("Go on from the last checkpoint", size="sm", visible=False, elem_classes=["ca-act"])
            wrong = gr.HTML(visible=False)
            drawn = gr.HTML(padding=False)
            log = gr.Textbox(
                label="The last lines of its log", lines=8, max_lines=14, interactive=False, elem_classes=["ca-log"]
            )
    return WatchTab(
        chosen=chosen,
        empty=empty,
        whole=whole,
        standing=standing,
        stop=stop,
        go_on=go_on,
        wrong=wrong,
        curves=drawn,
        log=log,
    )


def labels(there: dict[str, Path]) -> list[tuple[str, str]]:
    """What the list of runs shows, and the name behind it."""
    return [(f"{name} · {runs.standing(folder).state}", name) for name, folder in there.items()]


def _touched(folder: Path | None) -> list[Any]:
    """What changes where a run has written something."""
    if folder is None:
        return []
    found: list[Any] = [str(folder), runs.standing(folder)]
    for name in (runs.METRICS, runs.LOG, runs.RUN):
        file = folder / name
        found.append((file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None)
    return found


def figures(name: str, folder: Path, at: runs.Standing) -> dict[str, str]:
    """The figures beside how a run stands."""
    cells = summary(name, folder).cells()
    found = {label: cells[key] for key, label in (("adapters", "adapters"), ("held-out loss", "held-out loss"))}
    found |= {"best": cells["best"], "time": cells["time"], "memory at most": cells["memory"]}
    if at.state == "running" and (process := process_of(folder)) is not None:
        found |= {"memory now": size(process.memory_info().rss), "process": str(process.pid)}
    return {label: value for label, value in found.items() if value != NOTHING}


def wire(context: Context, tab: WatchTab) -> Remembered:
    """Says what happens."""
    kept, seen = context.kept("watched", ""), gr.State(None)
    outputs = [
        *(tab.chosen, tab.empty, tab.whole, tab.standing, tab.stop, tab.go_on),
        *(tab.curves, tab.log, seen, kept),
    ]

    def refresh(chosen: str | None, before: list[Any] | None) -> Any:
        if before is None:  # what was watched before the page was loaded is not there yet
            return [gr.skip() for _ in outputs]
        launch.reap()
        there = runs.found(context.runs)
        name = chosen if chosen in there else next(iter(there), None)
        folder = there.get(name or "")
        listed = labels(there)
        now = [repr(listed), *map(repr, _touched(folder))]
        if now == before:
            return [gr.skip() for _ in outputs]
        if folder is None:
            return [
                gr.Radio(choices=[], value=None),
                gr.HTML(visible=True),
                gr.Row(visible=False),
                *(gr.skip() for _ in outputs[3:-2]),
                now,
                "",
            ]
        # Without a value where it stays: a person may have chosen another meanwhile.
        again = gr.Radio(choices=listed) if name == chosen else gr.Radio(choices=listed, value=name)
        return [
            again,
            gr.HTML(visible=False),
            gr.Row(visible=True),
            *_details(name or "", folder),
            now,
            name,
        ]

    inputs = [tab.chosen, seen]
    changes: Any = [tab.chosen.change, gr.Timer(EVERY).tick]
    gr.on(changes, refresh, inputs, outputs, trigger_mode="always_last", concurrency_limit=None, **QUIET)

    def restore(name: str) -> list[Any]:
        there = runs.found(context.runs)
        return [gr.Radio(choices=labels(there), value=name if name in there else None), []]

    def act(name: str, what: Callable[[Path], None]) -> Any:
        try:
            what(runs.named(context.runs, name))
        except (ValueError, OSError) as error:
            return wrong_with(str(error))
        return wrong_with("")

    tab.stop.click(lambda name: act(name, launch.stop), tab.chosen, tab.wrong, **LOUD)
    tab.go_on.click(lambda name: act(name, launch.go_on), tab.chosen, tab.wrong, **LOUD)
    return Remembered(kept=kept, restore=restore, outputs=[tab.chosen, seen], after=(refresh, inputs, outputs))


def _details(name: str, folder: Path) -> list[Any]:
    at = runs.standing(folder)
    return [
        shown.standing(name, at, figures(name, folder, at)),
        gr.Button(visible=at.state == "running"),
        gr.Button(visible=at.state in ("stopped", "failed") and (folder / runs.RUN).is_file()),
        pictures(folder),
        runs.last_lines(folder),
    ]
