"""F1, F2, F3, F16: one training step of an adapter, beside the limit."""

from collections.abc import Mapping
from typing import Any

import torch

from .measuring import alive_after, interleaved
from .report import BYTES, Row, ratio
from .setting import LIBRARIES, LORA, Setting, Step, adapted, batch, limit, llama

N = 20
"""Virtual tokens."""
DROPOUTS = (0.0, 0.05)

METHODS: Mapping[str, tuple[str, Mapping[str, Any], bool]] = {
    "LoRA": ("LoraConfig", LORA, True),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}, True),
    "IA3": ("IA3Config", {}, True),
    "BitFit": ("BitFitConfig", {"target_modules": "all-linear"}, False),
    "norms": ("LNTuningConfig", {}, True),
    "bottleneck, after attention and feed-forward": (
        "BottleneckConfig",
        {"bottleneck_size": 64, "placement": "houlsby"},
        False,
    ),
    "bottleneck, after feed-forward": ("BottleneckConfig", {"bottleneck_size": 64}, False),
    "bottleneck, parallel": ("BottleneckConfig", {"bottleneck_size": 64, "placement": "parallel"}, False),
    "invertible": ("InvertibleConfig", {}, False),
    "full copy of v_proj": ("FullCopyConfig", {"target_modules": ["v_proj"]}, False),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": N}, True),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": N}, True),
    "P-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": N}, True),
    "tokens": ("TrainableTokensConfig", {"token_indices": list(range(10))}, True),
}
"""Name -> configuration, its options, and whether peft has it, too."""


def lora_steps(setting: Setting, dtype: torch.dtype, dropout: float = 0.0) -> dict[str, Step]:
    """The limit and each library's step with LoRA r=8 on all linear layers."""
    ids = batch(setting)
    steps = {"limit": limit(llama(setting, dtype), ids)}
    for library in LIBRARIES:
        view = adapted(library, llama(setting, dtype), "LoraConfig", **LORA, lora_dropout=dropout)
        steps[library] = Step(view, input_ids=ids, labels=ids)
    return steps


def single(setting: Setting) -> list[Row]:
    steps = lora_steps(setting, torch.float32)
    return [ratio("F1", "LoRA r=8, all linears, fp32: step / limit", interleaved(steps, setting), 1.10)]


def half(setting: Setting) -> list[Row]:
    return [
        ratio(
            "F2",
            f"the same, bf16 base, fp32 adapter, dropout {dropout:g}: step / limit",
            interleaved(lora_steps(setting, torch.bfloat16, dropout), setting),
            goal,
        )
        for dropout, goal in zip(DROPOUTS, (1.15, 1.20), strict=True)
    ]


def kept(steps: Mapping[str, Step]) -> dict[str, list[float]]:
    for step in steps.values():
        step()  # what a first call makes for all that follow is not this backward's
    return {who: [alive_after(step.forward)] for who, step in steps.items()}


def memory(setting: Setting) -> list[Row]:
    """All that is alive after the forward, each storage once, without what was there before: weights, inputs."""
    ids = batch(setting)
    rows: list[Row] = []
    for dtype, name, dropout in ((torch.float32, "fp32", 0.0), *((torch.bfloat16, "bf16", d) for d in DROPOUTS)):
        steps = lora_steps(setting, dtype, dropout)
        steps["full"] = Step(llama(setting, dtype).train(), input_ids=ids, labels=ids)
        found = kept(steps)
        what = f"bytes kept for the backward, {name}, dropout {dropout:g}"
        rows += [ratio("F3", f"{what} / limit", found, 1.25, unit=BYTES)]
        rows += [ratio("F3", f"{what} / full fine-tuning", found, 1.0, base="full", unit=BYTES)]
    return rows


def methods(setting: Setting) -> list[Row]:
    """Every method's step and bytes beside the limit. The goal is peft's own figure, where it has the method."""
    return [row for name in METHODS for row in one_method(setting, name)]


def one_method(setting: Setting, name: str) -> list[Row]:
    config, options, both = METHODS[name]
    ids = batch(setting)
    steps = {"limit": limit(llama(setting), ids)}
    for library in LIBRARIES if both else ["coadapt"]:
        steps[library] = Step(adapted(library, llama(setting), config, **options), input_ids=ids, labels=ids)
    row = ratio("F16", f"{name}: step / limit", interleaved(steps, setting))
    held = ratio("F16", f"{name}: bytes kept for the backward / limit", kept(steps), unit=BYTES)
    return [row.no_more_than_peft(), held.no_more_than_peft()]
