"""The words of a run: other programs' names for ours, YAML, `name=value`, and `method` in place of `adapters`."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from coadapt.config import did_you_mean
from coadapt.training.options import MethodOptions, method_named, methods

ALIASES = {
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "peft_type": "method",
    "finetuning_type": "method",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "resume_from_checkpoint": "resume",
    "torch_dtype": "dtype",
}
"""Other programs' names -> ours."""

GONE = {
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead",
    "save_safetensors": "files are always safetensors",
    "group_by_length": "rows are not sorted by length",
    "tokenizer": "the model's own tokenizer is used",
    "quantization_bit": "say load_in_4bit: true, or load_in_8bit: true",
}
"""Names that other programs know and that have no meaning here."""

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


NAMES = re.compile(r"[\w.,\s]+")
"""Module names, one or several; a regular expression has other signs too."""


class SettingHint(UserWarning):
    """A setting was understood under another name."""


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: it is no YAML, or not names with values; says where.
    """
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} should hold names with values (`model: …`); it holds {values!r}.")
    return values


def override(values: dict[str, Any], setting: str) -> None:
    """Puts `name=value`, or `adapters.task.learning_rate=5e-3`, into `values`; the value is read as YAML.

    Raises:
        ValueError: it has no `=`, or a part before the last dot is no group of settings.
    """
    path, sign, text = setting.partition("=")
    if not sign or not path:
        raise ValueError(f"{setting!r} is no setting: write name=value, as in learning_rate=1e-4.")
    *groups, name = path.strip().split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{setting!r}: {group}={inner!r} is one value, and has no {name!r} inside.")
        values = inner
    values[name] = yaml.safe_load(text) if text else ""


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have a value, under our names; a hint for each that had another.

    Raises:
        ValueError: one setting under two names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = str(name).replace("-", "_")
        ours = ALIASES.get(key, key)
        if value is None:
            continue
        if ours != key:
            warnings.warn(f"{key} is called {ours} here.", SettingHint, stacklevel=2)
        if ours in found:
            raise ValueError(f"{ours} is given twice, by {name} and under another of its names")
        found[ours] = value
    return found


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], owner: str) -> None:
    """Raises a ValueError for a setting that `owner` has not; it tells the nearest name, or what to do instead."""
    for name in values:
        if name in GONE:
            raise ValueError(f"{name} is not read: {GONE[name]}")
        if name not in known:
            raise ValueError(f"{name!r} is no setting of {owner}.{did_you_mean(name, known)}")


def adapters_of(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`adapters`, or what `method` and the options beside it say: each option goes to the methods that read it."""
    if given := values.get("adapters"):
        if values.get("method") or options:
            beside = ", ".join(["method"] * ("method" in values) + list(options))
            raise ValueError(
                f"{beside} beside adapters: say it inside the adapter that is meant, as in adapters.task.r=8"
            )
        if not isinstance(given, Mapping):
            raise ValueError(f"adapters are names with settings; got {given!r}")
        return {str(name): adapter for name, adapter in given.items()}
    words = [word.strip() for word in str(values.get("method") or "lora").split("+")]
    if len(set(words)) < len(words):
        raise ValueError(f"method={values['method']!r} names one twice: use adapters, which have names of their own")
    chosen = {("default" if len(words) == 1 else word): method_named(word) for word in words}
    for option in options:
        if not any(option in method.names() for method in chosen.values()):
            readers = [m.name for m in methods().values() if option in m.names()]
            raise ValueError(f"{option} is not read by {' or '.join(words)}, but by {', '.join(readers)}")
    return {
        name: {"method": method.name, **{k: v for k, v in options.items() if k in method.names()}}
        for name, method in chosen.items()
    }


def plain_value(name: str, value: Any, method: MethodOptions) -> Any:
    """`1e-4`, which YAML takes for text, as a number; names with commas as a list, where a list is meant."""
    if not isinstance(value, str):
        return value
    if NUMBER.fullmatch(value):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    kinds = [o.annotation for o in (*method.own, *method.inherited) if o.name == name]
    if not any(kind.startswith("Sequence") for kind in kinds) or not NAMES.fullmatch(value):
        return value
    parts = [part.strip() for part in value.split(",")]
    numbers = any(kind.startswith("Sequence[int]") for kind in kinds) and all(part.isdecimal() for part in parts)
    return [int(part) for part in parts] if numbers else parts
