"""The page: four tabs, and what is common to them."""

from pathlib import Path

import gradio as gr

from coadapt.ui import tab_chat, tab_compare, tab_train, tab_watch
from coadapt.ui.context import QUIET, Context

FONT = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "DejaVu Sans Mono", "monospace"]
"""Of the machine itself: none is fetched."""
HEAD = '<div class="ca-head"><b>coadapt</b><span>runs in {}</span></div>'


def theme() -> gr.themes.Base:
    """Calm, and without fonts from elsewhere."""
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", radius_size="sm", font=FONT, font_mono=MONO)


def page(runs: Path, model: str = "") -> gr.Blocks:
    """The page of a folder of runs; `model` is proposed where none was chosen yet."""
    context = Context(runs=runs, model=model)
    with gr.Blocks(title="coadapt", analytics_enabled=False) as blocks:
        gr.HTML(HEAD.format(_shown(runs)))
        kept = context.kept("tab", "train")
        with gr.Tabs() as tabs:
            made: dict[str, gr.Tab] = {}
            with gr.Tab("Train", id="train") as made["train"]:
                train = tab_train.lay_out(context)
            with gr.Tab("Watch", id="watch") as made["watch"]:
                watch = tab_watch.lay_out(context)
            with gr.Tab("Chat", id="chat") as made["chat"]:
                chat = tab_chat.lay_out(context)
            with gr.Tab("Compare", id="compare") as made["compare"]:
                compare = tab_compare.lay_out(context)
        tab_train.wire(context, blocks, train, [tabs, watch.chosen])
        tab_watch.wire(context, blocks, watch)
        tab_chat.wire(context, blocks, chat)
        tab_compare.wire(context, blocks, compare)
        for name, tab in made.items():
            tab.select(lambda name=name: name, None, kept, queue=False, **QUIET)
        blocks.load(lambda name: gr.Tabs(selected=name), kept, tabs, **QUIET)
    return blocks


def _shown(runs: Path) -> str:
    from html import escape

    return escape(str(runs))
