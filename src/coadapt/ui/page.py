"""The page: four tabs, and what is common to them."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base, Default

from coadapt.ui import tab_chat, tab_compare, tab_train, tab_watch
from coadapt.ui.context import QUIET, Context, Remembered

FONT = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
"""Of the machine itself: none is fetched."""
HEAD = '<div class="ca-head {1}"><b>coadapt</b><span>runs in {0}</span></div>'
"""The second is a class that says that what the browser remembers is back in its place."""


def theme() -> Base:
    """Calm, and without fonts from elsewhere."""
    return Default(primary_hue="blue", neutral_hue="slate", radius_size="sm", font=FONT, font_mono=MONO)


def page(runs: Path, model: str = "") -> gr.Blocks:
    """The page of a folder of runs; `model` is proposed where none was chosen yet."""
    context = Context(runs=runs, model=model)
    with gr.Blocks(title="coadapt", analytics_enabled=False) as blocks:
        head = gr.HTML(HEAD.format(escape(str(runs)), ""))
        with gr.Tabs() as tabs:
            made: dict[str, gr.Tab] = {}
            with gr.Tab("Train", id="train") as made["train"]:
                train = tab_train.lay_out()
            with gr.Tab("Watch", id="watch") as made["watch"]:
                watch = tab_watch.lay_out(context)
            with gr.Tab("Chat", id="chat") as made["chat"]:
                chat = tab_chat.lay_out(context)
            with gr.Tab("Compare", id="compare") as made["compare"]:
                compare = tab_compare.lay_out(context)
        remembered = [
            tab_train.wire(context, train, [tabs, watch.chosen]),
            tab_watch.wire(context, watch),
            tab_chat.wire(context, chat),
            tab_compare.wire(context, compare),
            _chosen(context, tabs, made),
        ]
        _restored(blocks, remembered, head, HEAD.format(escape(str(runs)), "ca-ready"))
    return blocks


def _chosen(context: Context, tabs: gr.Tabs, made: Mapping[str, gr.Tab]) -> Remembered:
    """The tab that was looked at."""
    kept = context.kept("tab", "train")
    for name, tab in made.items():
        tab.select(lambda name=name: name, None, kept, queue=False, **QUIET)
    return Remembered(kept=kept, restore=lambda name: [gr.Tabs(selected=name)], outputs=[tabs])


def _restored(blocks: gr.Blocks, remembered: Sequence[Remembered], head: gr.HTML, ready: str) -> None:
    """Puts everything back at once when the page is loaded, and says so at its head."""

    def restore(*kept: Any) -> list[Any]:
        return [v for one, said in zip(remembered, kept, strict=True) for v in one.restore(said)]

    outputs = [output for one in remembered for output in one.outputs]
    event = blocks.load(restore, [one.kept for one in remembered], outputs, **QUIET)
    for one in remembered:
        if one.after is not None:
            event = event.then(*one.after, **QUIET)
    event.then(lambda: ready, None, head, **QUIET)
