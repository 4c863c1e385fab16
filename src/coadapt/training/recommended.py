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
        learning_rate=1e-3, source=UNSURE, small=1e-2, weight_decay=0.0, options={"num_virtual_tokens": 20}
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
}
"""The methods' starting values: those of the command line, of YAML, and of `coadapt.recommended`."""

OTHERS = Defaults(learning_rate=1e-4, source=UNSURE, small=1e-3)
"""For a method that has no line above."""
