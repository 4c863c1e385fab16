"""Parameter-efficient fine-tuning: any mix of adapters on one frozen model."""

import importlib
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Arrow": "core.routers",
    "AutoPeftModelForCausalLM": "auto",
    "AutoPeftModelForFeatureExtraction": "auto",
    "AutoPeftModelForQuestionAnswering": "auto",
    "AutoPeftModelForSeq2SeqLM": "auto",
    "AutoPeftModelForSequenceClassification": "auto",
    "AutoPeftModelForTokenClassification": "auto",
    "Fusion": "core.routers",
    "Learned": "core.gates",
    "PeftConfig": "methods",
    "PeftModel": "model",
    "PeftType": "config",
    "PooledRouter": "core.routers",
    "Seq": "core.composition",
    "Sum": "core.composition",
    "TaskRouter": "core.routers",
    "TaskType": "config",
    "TokenRouter": "core.routers",
    "XLoraRouter": "core.routers",
    "checkpoint": "core.frame",
    "convert_to_lora": "lora_form",
    "create_loraplus_optimizer": "training.optimizers",
    "create_lorafa_optimizer": "training.optimizers",
    "create_riemannian_optimizer": "training.optimizers",
    "estimate": "training.estimate",
    "export": "exporting",
    "find_kappa_target_modules": "kappa",
    "get_eva_state_dict": "starts",
    "get_layer_status": "core.status",
    "get_model_status": "core.status",
    "get_peft_model": "model",
    "initialize_kv_prefix_from_past_key_values": "prefix_starts",
    "initialize_kv_prefix_from_text": "prefix_starts",
    "initialize_lora_eva_weights": "starts",
    "preprocess_corda": "starts",
    "preprocess_loraga": "starts",
    "prepare_model_for_kbit_training": "quant.preparing",
    "replace_lora_weights_loftq": "starts",
    "save_as_lora": "lora_form",
    "recommended": "training.recommend",
}

# A method's file needs no line here: its configuration is found by its name, without importing it.
_root = Path(__file__).parent
for _file in (_root / "lora_options.py", *sorted((_root / "methods").glob("[a-z]*.py"))):
    for _name in re.findall(r"^class ([A-Z]\w*Config)\(", _file.read_text("utf-8"), re.MULTILINE):
        _HOMES[_name] = ".".join(_file.relative_to(_root).with_suffix("").parts)

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
