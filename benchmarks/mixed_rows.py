"""F4, F5, F14: batches whose rows use adapters of their own."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .measuring import interleaved, peak
from .report import BYTES, Row, ratio
from .setting import LIBRARIES, LORA, Setting, Step, adapted, add_loras, llama, tokens

GOALS: Mapping[tuple[int, int], float] = {(16, 1): 1.4, (64, 1): 1.5, (16, 32): 1.15, (64, 32): 1.15}
"""(adapters that are loaded, tokens in a row) -> time / base"""


def with_loras(library: str, setting: Setting, count: int) -> Any:
    """A Llama with LoRAs a0, a1, ..."""
    view = adapted(library, llama(setting), "LoraConfig", **LORA)
    add_loras(library, view, [f"a{i}" for i in range(1, count)])
    return view


def inference(setting: Setting) -> list[Row]:
    """16 rows, each with one of the loaded adapters, drawn without putting back where there are enough."""
    rows = setting.size(16, 3)
    views = {library: with_loras(library, setting, rows).eval() for library in LIBRARIES}
    base = llama(setting).eval()
    found: list[Row] = []
    for count in (rows, setting.size(64, 4)):
        for library, view in views.items():
            add_loras(library, view, [f"a{i}" for i in range(len(view.peft_config), count)])
            view.requires_grad_(False)  # as adapters are that were loaded
        names = [f"a{i}" for i in random.Random(0).sample(range(count), rows)]
        for length in (1, setting.size(32, 2)):
            ids = tokens(setting, rows, length)
            calls: dict[str, Any] = {"base": lambda ids=ids: base(ids)}
            for library, view in views.items():
                calls[library] = lambda view=view, ids=ids, names=names: view(ids, adapter_names=names)
            with torch.no_grad():
                seconds = interleaved(calls, setting)
            what = f"{rows} rows of {length} token{'s' * (length > 1)}, {count} adapters: forward / base"
            found.append(ratio("F4", what, seconds, GOALS.get((count, length)), base="base"))
    return found


def training(setting: Setting) -> list[Row]:
    """32 rows with an adapter each, against the same batch with one adapter for all."""
    rows = setting.size(32, 3)
    ids = tokens(setting, rows, setting.size(32, 2))
    names = [f"a{i}" for i in range(rows)]
    view = with_loras("coadapt", setting, rows)
    steps = {
        "one": Step(view, input_ids=ids, labels=ids, adapters="a0"),
        "coadapt": Step(view, input_ids=ids, labels=ids, adapter_names=names),
    }
    what = f"{rows} rows x {ids.shape[1]} tokens, {rows} adapters: training step / one adapter's"
    seconds = interleaved(steps, setting)
    return [ratio("F5", what, seconds, 1.3, base="one", without=peft_on_rows(setting, ids, names))]


def peft_on_rows(setting: Setting, ids: Tensor, names: Sequence[str]) -> str:
    """What peft says to a training step on rows of their own."""
    if "peft" not in LIBRARIES:
        return "none"
    view = with_loras("peft", setting, len(names))
    try:
        Step(view, input_ids=ids, labels=ids, adapter_names=names)()
    except ValueError:
        return "refused"
    return "not timed"


def joint(setting: Setting) -> list[Row]:
    """Eight adapters on a batch each: all batches in one step, against eight steps in turn."""
    count = setting.size(8, 2)
    view = with_loras("coadapt", setting, count)
    found: list[Row] = []
    for rows, length, goal in ((1, setting.size(32, 2), 0.9), (setting.size(4, 1), setting.size(128, 3), None)):
        ids = tokens(setting, count * rows, length)
        parts = ids.split(rows)
        alone = [Step(view, input_ids=x, labels=x, adapters=f"a{i}") for i, x in enumerate(parts)]
        names = [f"a{i}" for i in range(count) for _ in range(rows)]
        together = Step(view, input_ids=ids, labels=ids, adapter_names=names)

        def in_turn(alone: Sequence[Step] = alone) -> None:
            for step in alone:
                step()

        seconds = interleaved({"in turn": in_turn, "coadapt": together}, setting)
        what = f"{count} adapters on batches of {rows} x {length}"
        beside = peft_on_rows(setting, ids, names)
        found += [ratio("F14", f"{what}: one step / in turn", seconds, goal, base="in turn", without=beside)]
        found += [memory(setting, what, view.get_base_model(), together, alone[0], count, beside)]
    return found


def memory(setting: Setting, what: str, base: Any, together: Step, one: Step, count: int, peft: str) -> Row:
    """Peaks with the base counted in; the goal is that of one base and of as much beside it as the runs have."""
    weights = sum(p.nbytes for p in base.parameters())
    beside = peak(one, setting.device)
    side_by_side = count * (weights + beside)
    found = {"side by side": [side_by_side], "coadapt": [weights + peak(together, setting.device)]}
    what = f"{what}: peak bytes / {count} runs with a base each"
    goal = (weights + count * beside) / side_by_side
    return ratio("F14", what, found, goal, base="side by side", unit=BYTES, without=peft)
