"""F17: a training step of every other method that peft has, too, beside peft's own."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from .measuring import interleaved
from .report import BYTES, Row, markdown, ratio
from .setting import LIBRARIES, Setting, Step, batch, config, llama
from .training_step import N, kept

ROUNDS = 7
"""Of each method: there are many, and peft's step of some takes seconds."""
STEP, KEPT = "step", "bytes kept for the backward"
TARGETS = {"target_modules": ["q_proj", "v_proj"]}
TASKS = {"num_tasks", "n_tasks"}
"""Options of methods that are told the task of each row."""
HEAD = ("F17", "peft's step", "coadapt's over it", "peft's bytes kept", "coadapt's over them")


def configurations(setting: Setting) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """Name -> configuration and its options: those of the class where they fit the model."""
    size = setting.size
    layers: dict[str, tuple[str, dict[str, Any]]] = {
        "AdaLoRA": ("AdaLoraConfig", {"total_step": 1000}),
        "BEFT": ("BeftConfig", {}),
        "BOFT": ("BOFTConfig", {}),
        "C3A": ("C3AConfig", {"block_size": size(128, 8)}),
        "DEFT": ("DeftConfig", {}),
        "DeLoRA": ("DeloraConfig", {}),
        "FourierFT": ("FourierFTConfig", {"n_frequency": size(1000, 40)}),
        "FRoD": ("FrodConfig", {}),
        "GLoRA": ("GloraConfig", {}),
        "GraLoRA": ("GraloraConfig", {"r": size(32, 4)}),
        "HiRA": ("HiraConfig", {}),
        "HRA": ("HRAConfig", {}),
        "Lily": ("LilyConfig", {"r": size(32, 4)}),
        "LoHa": ("LoHaConfig", {}),
        "LoKr": ("LoKrConfig", {}),
        "MiSS": ("MissConfig", {"r": size(64, 4)}),
        "OFT": ("OFTConfig", {"oft_block_size": size(32, 8)}),
        "OSF": ("OSFConfig", {}),
        "PEANuT": ("PeanutConfig", {"r": size(32, 4)}),
        "PSOFT": ("PsoftConfig", {"r": size(32, 4)}),
        "PVeRA": ("PveraConfig", {}),
        "RandLoRA": ("RandLoraConfig", {"r": size(32, 4)}),
        "RoAd": ("RoadConfig", {"group_size": size(64, 8)}),
        "SHiRA": ("ShiraConfig", {"r": size(32, 2)}),
        "Supertuning": ("SupertuningConfig", {}),
        "TinyLoRA": ("TinyLoraConfig", {}),
        "Uni-LoRA": ("UniLoraConfig", {}),
        "VB-LoRA": ("VBLoRAConfig", {"vector_length": size(256, 8)}),
        "VeRA": ("VeraConfig", {}),
        "WaveFT": ("WaveFTConfig", {"n_frequency": size(2592, 40)}),
    }
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "CPT": ("CPTConfig", {"cpt_token_ids": list(range(N))}),
        "cartridge": ("CartridgeConfig", {"num_virtual_tokens": N}),
        "LLaMA-Adapter": ("AdaptionPromptConfig", {"adapter_len": 10, "adapter_layers": size(4, 1)}),
        "multitask prompt": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": N, "num_tasks": 2}),
        "Poly": ("PolyConfig", {**TARGETS, "n_tasks": 2}),
    }
    if importlib.util.find_spec("sklearn") is not None:  # which theirs needs
        layers["AdaMSS"] = ("AdamssConfig", {"r": size(100, 8)})
    return {**{name: (config, {**TARGETS, **options}) for name, (config, options) in layers.items()}, **others}


def methods(setting: Setting) -> list[Row]:
    """Two rows for each method: its step and what it keeps, over peft's."""
    return [row for name in configurations(setting) for row in one_method(setting, name)]


def one_method(setting: Setting, name: str) -> list[Row]:
    kind, options = configurations(setting)[name]
    few = replace(setting, rounds=min(setting.rounds, ROUNDS))
    steps = {library: step(setting, library, kind, options) for library in LIBRARIES}
    times, held = interleaved(steps, few), kept(steps)
    return [
        ratio("F17", f"{name}: {STEP}", times, 1.0, base="peft"),
        ratio("F17", f"{name}: {KEPT}", held, 1.0, base="peft", unit=BYTES),
    ]


def step(setting: Setting, library: str, kind: str, options: Mapping[str, Any]) -> Step:
    """Under the name that adapters have by themselves: peft's CPT takes no other."""
    view = LIBRARIES[library].get_peft_model(llama(setting), config(library, kind, **options)).train()
    ids = batch(setting)
    told = {"task_ids": torch.arange(len(ids), device=ids.device) % 2} if TASKS & set(options) else {}
    return Step(view, input_ids=ids, labels=ids, **told)


def compact(rows: Sequence[Row]) -> str:
    """A line for each method."""
    told: dict[str, dict[str, Row]] = {}
    for row in rows:
        name, _, what = row.what.rpartition(": ")
        told.setdefault(name, {})[what] = row
    body = [
        [name, *(cell for what in (STEP, KEPT) for cell in (str(found[what].base), str(found[what].coadapt)))]
        for name, found in told.items()
    ]
    return markdown(HEAD, body)
