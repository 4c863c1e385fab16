"""The tab of a conversation: a run's adapters, a slider for the gate of each, and the base's answer beside theirs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from coadapt.ui import runs, shown
from coadapt.ui.context import COMPLAINTS, LOUD, QUIET, Context, Remembered, wrong_with

if TYPE_CHECKING:
    from coadapt.ui.talk import Loaded

MOST = 8
"""Adapters that there are sliders for."""
WIDEST = 2.0
"""The right end of a gate's slider, where its gate is not larger already."""
LONGEST = 128
EMPTY = "Load a run, or any adapter folder, and ask it something."
FIRST: dict[str, Any] = {"adapter": "", "model": "", "turns": [], "gates": {}, "saved": {}, "told": ""}

AT_ONCE: dict[str, Any] = {"queue": False, **QUIET}

Turns = list[dict[str, str]]
"""`question`, `answer`, and `base`, the base's answer, where it was asked, too."""


@dataclass(frozen=True, kw_only=True)
class ChatTab:
    """The components of the tab."""

    adapter: gr.Dropdown
    model: gr.Textbox
    load: gr.Button
    sliders: list[gr.Slider]
    composition: gr.HTML
    temperature: gr.Slider
    longest: gr.Slider
    compare: gr.Checkbox
    wrong: gr.HTML
    adapted: gr.Chatbot
    base: gr.Chatbot
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    clear: gr.Button


def lay_out(context: Context) -> ChatTab:
    """Makes the components."""
    with gr.Row():
        with gr.Column(scale=3, min_width=280):
            adapter = gr.Dropdown([], label="Run, or adapter folder", allow_custom_value=True)
            model = gr.Textbox(label="Base", placeholder="the one that it names", max_lines=1)
            load = gr.Button("Load", size="md")
            sliders = [gr.Slider(0, WIDEST, step=0.01, label="", visible=False, buttons=[]) for _ in range(MOST)]
            composition = gr.HTML()
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", buttons=[])
            longest = gr.Slider(1, 1024, value=LONGEST, step=1, label="Longest answer, tokens", buttons=[])
            compare = gr.Checkbox(label="The base's answer beside it")
        with gr.Column(scale=8, min_width=480):
            wrong = gr.HTML(visible=False)
            with gr.Row():
                adapted = _conversation("adapted", "with its adapters", EMPTY)
                base = _conversation("base", "the base", "The base's answers stand here.", visible=False)
            question = gr.Textbox(label="Question", placeholder="Shift+Enter asks", lines=3, max_lines=10)
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", size="md")
                stop = gr.Button("Stop", size="md")
                clear = gr.Button("Forget what was said", size="md")
    return ChatTab(
        adapter=adapter,
        model=model,
        load=load,
        sliders=sliders,
        composition=composition,
        temperature=temperature,
        longest=longest,
        compare=compare,
        wrong=wrong,
        adapted=adapted,
        base=base,
        question=question,
        ask=ask,
        stop=stop,
        clear=clear,
    )


def _conversation(name: str, label: str, placeholder: str, visible: bool = True) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        elem_id=f"ca-{name}",
        placeholder=placeholder,
        height=520,
        min_width=220,
        visible=visible,
        buttons=["copy"],
        render_markdown=False,  # a model's text is shown as it is
        allow_file_downloads=False,
        feedback_options=None,
    )


def messages(turns: Turns, key: str) -> list[Any]:
    """A conversation as it is shown; `key` says whose answers. Escaped, or tags in it would be HTML."""
    found: list[dict[str, str]] = []
    for turn in turns:
        found.append({"role": "user", "content": escape(turn["question"], quote=False)})
        if turn.get(key):
            found.append({"role": "assistant", "content": escape(turn[key], quote=False)})
    return found


def folders(context: Context) -> list[tuple[str, str]]:
    """The runs that have adapters, with their folders."""
    there = runs.found(context.runs).items()
    return [(name, str(folder)) for name, folder in there if runs.standing(folder).state == "done"]


def _shown_sliders(gates: dict[str, float], saved: dict[str, float]) -> list[Any]:
    found: list[Any] = []
    for name, value in list(gates.items())[:MOST]:
        widest = max(WIDEST, math.ceil(saved.get(name, 0.0)))
        found.append(gr.Slider(label=f"gate of {name}", value=value, maximum=widest, visible=True))
    return [*found, *(gr.Slider(visible=False) for _ in range(MOST - len(found)))]


def _told(loaded: "Loaded") -> str:
    """What is to be known of a model once it is loaded."""
    parts = [loaded.gates.why_none, loaded.alone and f"{loaded.alone[0].upper()}{loaded.alone[1:]}."]
    if len(loaded.gates.values) > MOST:
        parts.append(f"There are sliders for the first {MOST} adapters; the others stay as saved.")
    return " ".join(part for part in parts if part)


def wire(context: Context, tab: ChatTab) -> Remembered:
    """Says what happens."""
    kept = context.kept("chat", FIRST)
    turns, saved, told = gr.State([]), gr.State({}), gr.State("")
    settings: list[Any] = [tab.adapter, tab.model, tab.temperature, tab.longest, tab.compare]
    everything = [*settings, turns, saved, told, *tab.sliders]
    tab.adapter.focus(lambda: gr.Dropdown(choices=folders(context)), None, tab.adapter, queue=False, **QUIET)
    loaded = [tab.wrong, saved, told, *tab.sliders]
    event = tab.load.click(partial(_load, context), [tab.adapter, tab.model], loaded, **LOUD)
    event.then(_keep, everything, kept, **QUIET)
    changes: Any = [c.change for c in (saved, told, *tab.sliders)]
    inputs = [tab.adapter, tab.model, saved, told, *tab.sliders]
    gr.on(changes, partial(_told_active, context), inputs, tab.composition, trigger_mode="always_last", **AT_ONCE)
    changes = [c.change for c in (*settings, turns, *tab.sliders)]
    gr.on(changes, _keep, everything, kept, trigger_mode="always_last", **AT_ONCE)
    tab.compare.change(lambda on: gr.Chatbot(visible=on), tab.compare, tab.base, **AT_ONCE)
    _wire_asking(context, tab, everything, turns)
    outputs = [*everything, tab.adapted, tab.base]
    return Remembered(kept=kept, restore=partial(_restore, context), outputs=outputs)


def _keep(*values: Any) -> dict[str, Any]:
    """What the browser remembers."""
    names = ("adapter", "model", "temperature", "longest", "compare", "turns", "saved", "told")
    said = dict(zip(names, values[: len(names)], strict=True))
    return {**said, "gates": _gates(said["saved"], values[len(names) :])}


def _restore(context: Context, said: dict[str, Any]) -> list[Any]:
    before: Turns = said.get("turns", [])
    compare = bool(said.get("compare"))
    adapter = said.get("adapter") or None
    return [
        gr.Dropdown(choices=folders(context), value=adapter),
        said.get("model") or (context.model if not adapter else ""),
        said.get("temperature", 0),
        said.get("longest", LONGEST),
        compare,
        before,
        said.get("saved", {}),
        said.get("told", ""),
        *_shown_sliders(said.get("gates", {}), said.get("saved", {})),
        messages(before, "answer"),
        gr.Chatbot(value=messages(before, "base"), visible=compare),
    ]


def _load(context: Context, adapter: str | None, model: str | None) -> list[Any]:
    """What is wrong, the gates as they were saved, what is to be known, the sliders."""
    try:
        found = context.talker.load(adapter or "", model or "")
    except COMPLAINTS as error:
        return [wrong_with(str(error)), {}, "", *_shown_sliders({}, {})]
    gates = dict(found.gates.values)
    return [wrong_with(""), gates, _told(found), *_shown_sliders(gates, gates)]


def _told_active(
    context: Context, adapter: str | None, model: str | None, saved: dict[str, float], told: str, *sliders: float
) -> str:
    """The composition that the sliders make."""
    if not saved and not told:
        return ""  # nothing was loaded yet
    text = context.talker.text(adapter or "", model or "", saved, _gates(saved, sliders))
    return (shown.label("active") + shown.code(text) if text else "") + shown.quiet(told)


def _gates(saved: dict[str, float], sliders: Sequence[float]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(saved, sliders, strict=False)}


def _wire_asking(context: Context, tab: ChatTab, everything: list[Any], turns: gr.State) -> None:
    outputs = [tab.wrong, tab.question, turns, tab.adapted, tab.base]

    def ask(question: str, *values: Any) -> Iterator[Any]:
        adapter, model, temperature, longest, compare, before, saved, _, *sliders = values
        if not question.strip():
            gr.Info("Write a question first.", duration=3)  # passes by: a second click on Ask says it, too
            yield [gr.skip() for _ in outputs]
            return
        from coadapt.ui.talk import Asked

        how = Asked(temperature=temperature, max_new_tokens=int(longest), compare=compare, gates=_gates(saved, sliders))
        said = [(t["question"], t["answer"]) for t in before if t.get("answer")]
        turn = {"question": question.strip(), "answer": "", "base": ""}
        now: Turns = [*before, turn]
        yield [wrong_with(""), "", gr.skip(), messages(now, "answer"), messages(now, "base")]
        try:
            for base, text in context.talker.answers(adapter or "", model or "", said, turn["question"], how):
                turn["base" if base else "answer"] = text
                yield [gr.skip(), gr.skip(), now, messages(now, "answer"), messages(now, "base")]
        except COMPLAINTS as error:
            yield [
                wrong_with(str(error)),
                question,
                before,
                messages(before, "answer"),
                messages(before, "base"),
            ]

    asked: Any = [tab.ask.click, tab.question.submit]
    asking = gr.on(asked, ask, [tab.question, *everything], outputs, concurrency_limit=None, **QUIET)
    tab.stop.click(None, None, None, cancels=[asking], api_visibility="private")
    forget: Any = [tab.clear.click, tab.adapted.clear, tab.base.clear]
    gr.on(forget, lambda: [[], [], []], None, [turns, tab.adapted, tab.base], cancels=[asking], **QUIET)
