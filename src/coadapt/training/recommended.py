"""The methods' starting values, a line each; known without importing torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a method starts from where nothing else is said; docs/learning_rates.md has the figures."""

    learning_rate: float
    """For bases of `SMALL` parameters and more."""
    source: str
    """Who found that rate good."""
    small: float
    """The rate for smaller bases, measured by benchmarks/learning_rates.py."""
    weight_decay: float | None = None
    """None: the run's."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Options of its configuration that are not the class's defaults."""


SMALL = 10_000_000
"""Below so many parameters a base is small. Measured are 0.2 to 0.7 million; what is published is of 100 and more."""
MEASURED = "measured on small models, docs/learning_rates.md"
UNSURE = "no published figure that we know of"
COMPARED = "huggingface/peft, method_comparison, Llama-3.2-3B on MetaMathQA"
"""How many of GSM8K's answers were right stands behind it; of a LoRA's there, 48 %."""

RECOMMENDED: Mapping[str, Defaults] = {
    "lora": Defaults(
        learning_rate=2e-4,
        source="arXiv:2106.09685, GPT-3",
        small=3e-3,
        options={"r": 16, "target_modules": "all-linear"},
    ),
    "dora": Defaults(
        learning_rate=2e-4,
        source="the LoRA's",
        small=3e-3,
        options={"r": 16, "target_modules": "all-linear"},
    ),
    "prompt_tuning": Defaults(
        learning_rate=5e-3,
        source="the best of four rates on GPT2-XL, MNLI",
        small=1e-1,
        weight_decay=0.0,
        options={"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"},
    ),
    "prefix_tuning": Defaults(
        learning_rate=5e-3,
        source="the better of two rates on Llama-3.2-3B, MetaMath",
        small=1.0,
        weight_decay=0.0,
        options={"num_virtual_tokens": 20},
    ),
    "p_tuning": Defaults(
        learning_rate=1e-3,
        source="the best of four rates, huggingface/peft pull request 3356, Llama-3.2-3B on MetaMathQA",
        small=1e-2,
        weight_decay=0.0,
        options={"num_virtual_tokens": 20},
    ),
    "bottleneck": Defaults(learning_rate=1e-4, source="arXiv:2106.09685, GPT-3", small=1e-2),
    "bitfit": Defaults(learning_rate=1.6e-3, source="arXiv:2106.09685, GPT-3", small=3e-2),
    "ln_tuning": Defaults(learning_rate=1e-3, source=UNSURE, small=3e-2),
    "ia3": Defaults(learning_rate=3e-3, source="arXiv:2205.05638, T0", small=1e-1),
    "full_copy": Defaults(
        learning_rate=2e-5,
        source="arXiv:1810.04805, BERT",
        small=1e-3,
        options={"target_modules": "all-linear"},
    ),
    "adalora": Defaults(
        learning_rate=5e-4, source="arXiv:2303.10512, README of the authors' code, DeBERTaV3 on MNLI", small=3e-2
    ),
    "adamss": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 34 %", small=3e-2),
    "adaption_prompt": Defaults(
        learning_rate=5e-3, source=f"{COMPARED}: 38 %", small=3e-2, weight_decay=0.0, options={"adapter_len": 10}
    ),
    "beft": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 33 %", small=3e-1),
    "boft": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 36 %", small=3e-2),
    "c3a": Defaults(learning_rate=3e-1, source=f"{COMPARED}: 49 %", small=1.0),
    "cartridge": Defaults(
        learning_rate=2e-2,
        source="arXiv:2506.06266, examples of the authors' code, Llama-3.1-8B",
        small=1.0,
        weight_decay=0.0,
        options={"num_virtual_tokens": 20},
    ),
    "compacter": Defaults(
        learning_rate=3e-3, source="arXiv:2106.04647, configurations of the authors' code, T5", small=1e-2
    ),
    "cpt": Defaults(learning_rate=5e-3, source=f"prompt tuning's; {UNSURE}", small=1e-2, weight_decay=0.0),
    "deft": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 48 %", small=1e-2),
    "delora": Defaults(learning_rate=1e-3, source=f"{COMPARED}: 50 %", small=1e-2),
    "fourierft": Defaults(
        learning_rate=3e-3, source="arXiv:2405.03003, Table 11, LLaMA", small=1e-2, options={"init_weights": True}
    ),
    "frod": Defaults(learning_rate=1e-3, source=f"{COMPARED}: 27 %", small=3e-2),
    "glora": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 42 %", small=1e-2),
    "gralora": Defaults(learning_rate=2e-4, source=f"{COMPARED}: 50 %", small=3e-3),
    "hira": Defaults(learning_rate=4.5e-3, source=f"{COMPARED}: 51 %", small=1e-2),
    "hra": Defaults(learning_rate=1e-4, source=f"BOFT's; {UNSURE}", small=3e-2),
    "invertible": Defaults(learning_rate=1e-4, source=f"the bottleneck's; {UNSURE}", small=1e-2),
    "lily": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 55 %", small=1e-2),
    "loha": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 42 %", small=3e-2),
    "lokr": Defaults(learning_rate=3e-3, source=f"{COMPARED}: 47 %", small=3e-2),
    "miss": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 51 %", small=1e-2),
    "mtl_lora": Defaults(
        learning_rate=3e-4, source="arXiv:2410.09437, scripts of the authors' code, Llama-2-7B", small=1e-2
    ),
    "multitask_prompt_tuning": Defaults(
        learning_rate=5e-3,
        source=f"prompt tuning's; {UNSURE}",
        small=1e-1,
        weight_decay=0.0,
        options={"num_virtual_tokens": 20},
    ),
    "oft": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 49 %", small=3e-3),
    "osf": Defaults(learning_rate=5e-5, source=f"{COMPARED}: 44 %", small=1e-3),
    "peanut": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 45 %", small=3e-3),
    "poly": Defaults(learning_rate=2e-4, source=f"the LoRA's; {UNSURE}", small=3e-2),
    "psoft": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 45 %", small=3e-3),
    "pvera": Defaults(learning_rate=3e-3, source=f"{COMPARED}: 33 %", small=1e-1),
    "randlora": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 52 %", small=3e-3),
    "reft": Defaults(learning_rate=9e-4, source="arXiv:2404.03592, README of the authors' code, LLaMA-7B", small=3e-2),
    "road": Defaults(learning_rate=1e-3, source=f"{COMPARED}: 40 %", small=1e-1),
    "shadow": Defaults(learning_rate=1e-4, source=UNSURE, small=1e-2),
    "shira": Defaults(learning_rate=3e-4, source=f"{COMPARED}: 53 %", small=3e-2),
    "supertuning": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 39 %", small=3e-1),
    "tinylora": Defaults(learning_rate=1e-3, source=f"{COMPARED}: 1 %", small=3e-2),
    "trainable_tokens": Defaults(learning_rate=2e-1, source=f"{COMPARED}: 29 %", small=1e-1),
    "unilora": Defaults(learning_rate=2e-3, source=f"{COMPARED}: 41 %", small=3e-1),
    "vblora": Defaults(
        learning_rate=5e-4,
        source="the best of three rates, huggingface/peft pull request 3546, Llama-3.2-3B on MetaMathQA: 41 %",
        small=3e-2,
    ),
    "vera": Defaults(learning_rate=1e-3, source=f"{COMPARED}: 37 %", small=1e-1),
    "waveft": Defaults(learning_rate=1e-4, source=f"{COMPARED}: 42 %", small=1e-3),
}
"""The methods' starting values: those of the command line, of YAML, and of `coadapt.recommended`."""

OTHERS = Defaults(learning_rate=1e-4, source=UNSURE, small=1e-3)
"""For a method that has no line above."""
