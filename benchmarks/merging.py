"""F15: merging, against the moving of as many bytes."""

from typing import Any

import torch

from .measuring import Candidate, interleaved
from .report import Row, ratio
from .setting import LIBRARIES, LORA, Setting, adapted, llama


def merge(setting: Setting) -> list[Row]:
    """LoRA on all linears into the weights for good: each weight is read once and written once.

    The limit is a copy of 256 MiB in the same round, scaled to the bytes of those weights.
    """
    source = torch.randn(setting.size(2**26, 2**16), device=setting.device)
    target = torch.empty_like(source)
    weights: list[int] = []

    def merging(library: str) -> Candidate:
        base: Any = llama(setting)
        weights.append(sum(p.nbytes for n, p in base.named_parameters() if n.endswith("_proj.weight")))
        state = {"view": adapted(library, base, "LoraConfig", **LORA)}

        def call() -> None:
            state["base"] = state.pop("view").merge_and_unload()

        def after() -> None:
            state["view"] = adapted(library, state.pop("base"), "LoraConfig", **LORA)

        return Candidate(call, after)

    candidates = {library: merging(library) for library in LIBRARIES}
    with torch.no_grad():
        seconds = interleaved({"copy": lambda: target.copy_(source), **candidates}, setting)
    seconds["limit"] = [took * weights[0] / source.nbytes for took in seconds["copy"]]
    what = f"merge LoRA r=8 into all linears ({weights[0] / 2**20:.0f} MiB) / reading and writing them"
    return [ratio("F15", what, seconds, 2.0)]
