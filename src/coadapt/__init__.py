"""Parameter-efficient fine-tuning: any mix of adapters on one frozen model."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "BitFitConfig": "methods.bitfit",
    "BottleneckConfig": "methods.bottleneck",
    "Learned": "core.composition",
    "LoraConfig": "methods.lora",
    "PeftConfig": "methods",
    "PeftModel": "model",
    "PeftType": "config",
    "PrefixTuningConfig": "methods.prefix",
    "PromptTuningConfig": "methods.prompt",
    "Seq": "core.composition",
    "Sum": "core.composition",
    "TaskType": "config",
    "checkpoint": "core.frame",
    "get_peft_model": "model",
}

__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and only that: `import coadapt` loads nothing heavy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'coadapt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
