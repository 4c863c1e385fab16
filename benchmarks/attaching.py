"""F6, F7, F8: adding, loading, saving and switching where many adapters are there."""

import functools
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .measuring import Candidate, interleaved
from .report import RATIO, SECONDS, Row, absolute
from .setting import LIBRARIES, LORA, Setting, adapted, add_loras, config, llama, tokens


def small_llama(setting: Setting) -> Any:
    """32 layers of 7 linear layers, all small: what is measured is the work per site, not per weight."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    return llama(setting, num_hidden_layers=setting.size(32, 1), **sizes)


@functools.cache
def loaded(library: str, setting: Setting) -> Any:
    """All adapters but the last: a0 to a58."""
    view = adapted(library, small_llama(setting), "LoraConfig", **LORA)
    add_loras(library, view, [f"a{i}" for i in range(1, setting.size(59, 2))])
    return view.eval()


def of_each(make: Callable[[str], Candidate]) -> dict[str, Candidate]:
    return {library: make(library) for library in LIBRARIES}


def few(setting: Setting) -> Setting:
    """Fewer rounds, where peft takes seconds."""
    return replace(setting, rounds=min(setting.rounds, 7))


def first(library: str, setting: Setting) -> Candidate:
    """The first adapter on a base that has none."""
    lora = config(library, "LoraConfig", **LORA)
    state = {"base": small_llama(setting)}

    def call() -> None:
        state["view"] = LIBRARIES[library].get_peft_model(state["base"], lora, adapter_name="a0")

    def after() -> None:
        state["base"] = state.pop("view").unload()

    return Candidate(call, after)


def last(library: str, setting: Setting) -> Candidate:
    view, lora = loaded(library, setting), config(library, "LoraConfig", **LORA)
    return Candidate(lambda: view.add_adapter("last", lora), lambda: view.delete_adapter("last"))


def adding(setting: Setting) -> list[Row]:
    begin = interleaved(of_each(lambda library: first(library, setting)), few(setting))
    end = interleaved(of_each(lambda library: last(library, setting)), few(setting))
    ratios = {name: [b / a for a, b in zip(begin[name], end[name], strict=True)] for name in LIBRARIES}
    count = f"adapter number {setting.size(60, 3)}"
    return [
        absolute("F6", f"first adapter, {setting.size(224, 7)} linears", begin, SECONDS, 0.05),
        absolute("F6", count, end, SECONDS, 0.05),
        absolute("F6", f"{count} / first", ratios, RATIO, 1.0),
    ]


def state_dict(library: str, view: Any) -> Any:
    """The tensors of one adapter."""
    if library == "peft":
        return LIBRARIES["peft"].get_peft_model_state_dict(view, adapter_name="a1")
    return view.get_adapter("a1").state_dict()


def files(setting: Setting) -> list[Row]:
    """With all but one loaded: the last one from its folder; the state dict of one; one into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        views = {library: loaded(library, setting) for library in LIBRARIES}
        folders = {library: Path(folder, library) for library in LIBRARIES}

        def save(library: str) -> Candidate:
            view, where = views[library], folders[library]
            return Candidate(lambda: view.save_pretrained(where, selected_adapters=["a1"]))

        def load(library: str) -> Candidate:
            view, where = views[library], folders[library] / "a1"
            return Candidate(lambda: view.load_adapter(where, "last"), lambda: view.delete_adapter("last"))

        def state(library: str) -> Candidate:
            return Candidate(lambda: state_dict(library, views[library]))

        saved = interleaved(of_each(save), few(setting))
        count = setting.size(60, 3)
        return [
            absolute("F7", f"load from disk as number {count}", interleaved(of_each(load), few(setting)), SECONDS, 0.1),
            absolute(
                "F7", f"state dict of one of {count - 1}", interleaved(of_each(state), few(setting)), SECONDS, 0.1
            ),
            absolute("F7", f"save one of {count - 1}", saved, SECONDS, 0.1),
        ]


def switching(setting: Setting) -> list[Row]:
    """`set_adapter` alone; and what it and the call after it take more than a call: work may be left for later."""
    one_token = tokens(setting, 1, 1) % 100

    def switch(library: str, then_call: bool) -> Candidate:
        view = loaded(library, setting)
        names = itertools.cycle(view.peft_config)

        def call() -> None:
            view.set_adapter(next(names))
            if then_call:
                view(one_token)

        return Candidate(call)

    def stay(library: str) -> Candidate:
        view = loaded(library, setting)
        return Candidate(lambda: view(one_token))

    with torch.no_grad():
        alone = interleaved(of_each(lambda library: switch(library, False)), setting)
        pairs = {f"{library} calls": stay(library) for library in LIBRARIES}
        both = interleaved({**of_each(lambda library: switch(library, True)), **pairs}, setting)
    more = {name: [a - b for a, b in zip(both[name], both[f"{name} calls"], strict=True)] for name in LIBRARIES}
    what = f"switch the active adapter, {setting.size(59, 2)} loaded"
    return [
        absolute("F8", what, alone, SECONDS, 1e-3),
        absolute("F8", f"{what}: with what the next call takes more", more, SECONDS, 1e-3),
    ]
