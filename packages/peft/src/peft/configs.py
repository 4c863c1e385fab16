"""Configurations. Other programs assign to their fields and save them, which coadapt's own do not allow."""

import contextlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import nn

import coadapt
from coadapt.config import CONFIGS, PeftConfig, VirtualTokensConfig, did_you_mean
from coadapt.core.adapter import Adapter
from coadapt.formats.configs import PEFT_VERSION, described, understood
from coadapt.formats.files import read_json
from coadapt.methods import CONFIGS as _all_known

assert _all_known is CONFIGS  # importing it has made all methods known

PromptLearningConfig = VirtualTokensConfig
PEFT_TYPE_TO_CONFIG_MAPPING = {coadapt.PeftType(kind): cls for kind, cls in CONFIGS.items() if kind.isupper()}

PromptTuningInit = StrEnum("PromptTuningInit", [(n, n) for n in ("TEXT", "SAMPLE_VOCAB", "RANDOM")])
PromptEncoderReparameterizationType = StrEnum("PromptEncoderReparameterizationType", [(n, n) for n in ("MLP", "LSTM")])
MultitaskPromptTuningInit = StrEnum(
    "MultitaskPromptTuningInit",
    [(n, n) for n in ("TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")],
)

_owners: dict[int, tuple["weakref.ref[Adapter]", "weakref.ref[nn.Module]"]] = {}
"""id of a configuration -> the adapter it was injected as, and its model: what a file says is found there."""
_OF_THE_HUB = frozenset(
    "cache_dir commit_hash force_download local_dir local_files_only proxies repo_type revision token".split()
) | {"trust_remote_code", "user_agent"}


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A configuration of the class that `config_dict["peft_type"]` names."""
    return PeftConfig.from_dict(config_dict)


def injected_as(config: PeftConfig, adapter: Adapter, model: nn.Module) -> None:
    """Remembers what a configuration has become, for its `save_pretrained`."""
    _owners[id(config)] = weakref.ref(adapter), weakref.ref(model)
    weakref.finalize(adapter, _owners.pop, id(config), None)


def injected_into(config: PeftConfig) -> nn.Module:
    """The model into which a configuration was injected."""
    model = _owners[id(config)][1]()
    assert model is not None
    return model


def _assign(self: PeftConfig, name: str, value: Any) -> None:
    """Sets a field, and checks the whole anew: a value that is refused leaves it as it was."""
    known = [f.name for f in fields(self)]
    if name not in known:
        raise AttributeError(f"{type(self).__name__} has no option {name!r}.{did_you_mean(name, known)}")
    before = dict(vars(self))
    object.__setattr__(self, name, value)
    try:
        self.__post_init__()
    except BaseException:
        vars(self).clear()
        vars(self).update(before)
        raise


def _read(cls: type[PeftConfig], folder: str | Path, subfolder: str | None = None, **hub: Any) -> PeftConfig:
    """Reads `adapter_config.json` from a local folder.

    Args:
        hub: how to download, taken as there: a local folder needs nothing of it.

    Raises:
        TypeError: another option.
        FileNotFoundError: there is no adapter.
        ValueError: as `PeftConfig.from_dict`.
    """
    if strange := hub.keys() - _OF_THE_HUB:
        raise TypeError(f"PeftConfig.from_pretrained has no option {', '.join(sorted(strange))}.")
    where = Path(folder, subfolder or "")
    if not (where / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{where} holds no adapter: adapter_config.json is missing (hub ids are not read: download the folder)."
        )
    said = read_json(where / "adapter_config.json")
    virtual = issubclass(CONFIGS.get(str(said.get("peft_type")), PeftConfig), VirtualTokensConfig)
    config = PeftConfig.from_dict(said) if virtual else understood(said, nn.Module())
    if not isinstance(config, cls):
        raise ValueError(f"{where} holds a {type(config).__name__}, which {cls.__name__} does not read.")
    return config


def _write(self: PeftConfig, save_directory: str | Path, **options: Any) -> None:
    """Writes `adapter_config.json`; of an adapter that is injected, with what was found in the model."""
    if used := {k for k, v in options.items() if v}:
        raise TypeError(f"PeftConfig.save_pretrained has no option {', '.join(sorted(used))}.")
    said = self.to_dict() | {"peft_version": PEFT_VERSION}
    owner = _owners.get(id(self))
    adapter, model = (None, None) if owner is None else (owner[0](), owner[1]())
    if adapter is not None and model is not None:
        with without_injected(model):
            said = described(adapter, model)
    where = Path(save_directory)
    where.mkdir(parents=True, exist_ok=True)
    (where / "adapter_config.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextlib.contextmanager
def without_injected(model: nn.Module) -> Iterator[None]:
    """Context: the model as it is without the module that holds injected adapters."""
    held = model._modules.pop(INJECTED, None)
    try:
        yield
    finally:
        if held is not None:
            model._modules[INJECTED] = held


INJECTED = "peft_adapters"
"""What the module that holds injected adapters is called in its model."""


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _subclasses(sub)


for _cls in _subclasses(PeftConfig):
    _cls.__setattr__ = _assign  # type: ignore[method-assign]
PeftConfig.from_pretrained = classmethod(_read)  # type: ignore[assignment,method-assign]
PeftConfig.save_pretrained = _write  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    return getattr(coadapt, name)
