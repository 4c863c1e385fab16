"""A trained folder and its base, ready to be asked."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from coadapt.config import PeftConfig
from coadapt.data.segments import Framing
from coadapt.formats.files import PROVENANCE, read_json, settle
from coadapt.model import PeftModel
from coadapt.training.assemble import TASKS, load_base, load_config, load_tokenizer, task_of_model
from coadapt.training.settings import Task


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model that can be asked, and how it was asked in training."""

    model: PeftModel | nn.Module
    tokenizer: PreTrainedTokenizerBase
    framing: Framing
    trained: bool = False
    """Whether the framing is that of a training; otherwise nothing is known of one."""


def base_of(adapter: Path) -> str | None:
    """The base that an adapter folder names."""
    for config in (adapter / "adapter_config.json", *sorted(adapter.glob("*/adapter_config.json"))):
        if config.is_file():
            return json.loads(config.read_text("utf-8")).get("base_model_name_or_path")
    return None


def load(model: str | None, adapter: Path | None, adapters: str | None = None) -> Ready:
    """The base (the adapter's own where `model` is None), with the adapter folder, of which `adapters` is active.

    Raises:
        ValueError: no base is named, or the folder does not fit it.
        FileNotFoundError: there is no such folder.
    """
    ready = load_bare(model, adapter)
    if adapter is None:
        return ready
    view = PeftModel.from_pretrained(ready.model, adapter)
    if adapters is not None:
        view.set_adapter(adapters)
    return replace(ready, model=view.eval())


def load_bare(model: str | None, adapter: Path | None) -> Ready:
    """As `load`, with nothing attached yet: the base that the adapter folder is for.

    Raises:
        ValueError: no base is named.
        FileNotFoundError: there is no such folder.
    """
    if adapter is not None and not adapter.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {str(adapter)!r}.")
    if adapter is not None:
        settle(adapter)
    name = model or (base_of(adapter) if adapter else None)
    if name is None:
        raise ValueError("Which base? Give --model" + (f"; {adapter} names none." if adapter else "."))
    config = load_config(name)
    task = (_task_of(adapter) if adapter else None) or task_of_model(config) or "causal-lm"
    tokenizer = load_tokenizer(str(adapter) if adapter and (adapter / "tokenizer_config.json").is_file() else name)
    told = _provenance(adapter if adapter is not None else Path(name))  # a merged model keeps its adapter's
    # Where nothing is known of its training, a prompt is taken as it is.
    framing = Framing(**told.get("prompt", {"separator": ""}))
    how: dict[str, Any] = {"tokenizer": tokenizer, "framing": framing, "trained": "prompt" in told}
    if adapter is None:
        return Ready(model=load_base(name, task, tokenizer).eval(), **how)
    base = load_base(name, task, tokenizer, classes=told.get("data", {}).get("classes", ()))
    return Ready(model=base.eval(), **how)


def _task_of(adapter: Path) -> Task | None:
    config = next((p for p in (adapter, *sorted(adapter.iterdir())) if (p / "adapter_config.json").is_file()), None)
    found = PeftConfig.from_pretrained(config).task_type if config else None
    return TASKS.get(found) if found else None


def _provenance(adapter: Path) -> dict[str, Any]:
    file = adapter / PROVENANCE
    return read_json(file) if file.is_file() else {}
