"""Everything that a folder tells of its adapters and of how they came about, for its card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from coadapt.formats.facts import Facts, read_facts
from coadapt.formats.files import PROVENANCE, read_json
from coadapt.formats.package import PICTURE, is_here, without_paths
from coadapt.training.assemble import TASKS, load_config
from coadapt.training.inspect import Contents, outline, read_folder
from coadapt.training.load import PROCESSORS
from coadapt.training.log import EVALUATION, METRICS, RUN, read_log
from coadapt.training.settings import RunConfig, Task


@dataclass(frozen=True, kw_only=True)
class Story:
    """What is known; nothing of it is a path of this machine."""

    folder: Path
    repo: str
    """What the folder is called in commands: a repository, or the folder's own name."""
    contents: Contents
    facts: Sequence[Facts]
    provenance: Mapping[str, Any]
    run: Mapping[str, Any]
    """The settings of the run; none where no run wrote the folder."""
    log: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    """What `coadapt eval` wrote there, less the rows; none where nothing was measured."""
    base: str | None
    """As others can name it; of a base on this machine, the last part of its path."""
    base_is_on_hub: bool
    parameters_of_base: int
    """0: the base is not at hand."""

    @cached_property
    def task(self) -> Task:
        """What the adapters are for."""
        if "task" in self.run:
            return self.run["task"]
        for one in self.facts:
            if (told := TASKS.get(str(one.config.get("task_type")))) is not None:
                return told
        return "causal-lm"

    @property
    def classes(self) -> Sequence[str]:
        """Of a classifier, by number."""
        return self.provenance.get("data", {}).get("classes") or ()

    @property
    def is_composition(self) -> bool:
        """Whether the folder is more than one adapter, which is active as it is."""
        return len(self.facts) > 1 or self.contents.composition != self.facts[0].name

    @property
    def has_processor(self) -> bool:
        """Whether a tokenizer, or an image processor, stands beside the adapters."""
        return any((self.folder / name).is_file() for name in PROCESSORS)

    @property
    def has_picture(self) -> bool:
        """Whether there is one of the loss."""
        return (self.folder / PICTURE).is_file()

    @property
    def data(self) -> Mapping[str, Mapping[str, Any]]:
        """Data set -> what is recorded of it, `name` among it."""
        said = self.provenance.get("data") or {}
        several = said.get("datasets")
        return several or ({"data": said} if said.get("name") else {})

    @property
    def methods(self) -> Sequence[str]:
        """Of the adapters, each once: `lora`, `prompt-tuning`."""
        return list(dict.fromkeys(one.kind.lower().replace("_", "-") for one in self.facts))


def read_story(folder: Path, repo: str | None = None, base: str | None = None) -> Story:
    """Reads an adapter folder: coadapt's, or the field's.

    Args:
        repo: the repository that it is for.
        base: the model of the hub that it is for, in place of what the folder names.

    Raises:
        FileNotFoundError, ValueError: it is none, or a file is damaged.
    """
    contents = read_folder(folder)
    named = contents.base
    facts = read_facts(folder, _settings_of_base(named)).adapters
    if any(one.form == "checkpoint" for one in facts):
        raise ValueError(
            f"{folder} is a checkpoint of transformers' Trainer. Make a folder of it first: coadapt export {folder} "
            "--for peft"
        )
    run = without_paths(_settings(folder / RUN))
    return Story(
        folder=folder,
        repo=repo or folder.resolve().name,
        contents=contents,
        facts=facts,
        provenance=without_paths(_json(folder / PROVENANCE)),
        run={**run, "model": base} if run and base else run,
        log=read_log(folder / METRICS),
        evaluation=without_paths({k: v for k, v in _json(folder / EVALUATION).items() if k not in ("rows", "values")}),
        base=base or (without_paths(named) if named else None),
        base_is_on_hub=base is not None or (named is not None and not is_here(named)),
        parameters_of_base=_size(named),
    )


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _settings(file: Path) -> dict[str, Any]:
    """What the run was told; not where on this machine it wrote, nor what is at its default."""
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not settings.")
    defaults = {name: field.get_default(call_default_factory=True) for name, field in RunConfig.model_fields.items()}
    return {k: v for k, v in found.items() if v is not None and v != defaults.get(k) and k != "output_dir"}


def _settings_of_base(base: str | None) -> dict[str, Any] | None:
    """What decides whether some programs load an adapter; None where the base is not at hand."""
    try:
        config = load_config(base) if base else None
    except ValueError:
        return None
    layers = getattr(config, "num_hidden_layers", None)
    return None if config is None else {"model_type": config.model_type, "num_hidden_layers": layers}


def _size(base: str | None) -> int:
    try:
        return sum(p.numel() for p in outline(base).parameters()) if base else 0
    except (ValueError, OSError):
        return 0
