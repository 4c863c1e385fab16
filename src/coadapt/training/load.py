"""A trained folder and its base, ready to be asked."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from coadapt.core import routing
from coadapt.data.by_task import TASK, number_of
from coadapt.data.segments import Framing
from coadapt.formats.facts import read_facts
from coadapt.formats.files import PROVENANCE, read_json, settle
from coadapt.formats.package import place_of
from coadapt.formats.vocabulary import rows_needed
from coadapt.model import PeftModel
from coadapt.training.assemble import TASKS, Processor, load_base, load_config, load_processor, task_of_model
from coadapt.training.machine import best
from coadapt.training.settings import Task

PROCESSORS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
"""Files that say that a folder has a tokenizer, or an image processor, of its own."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A model that can be asked, and how it was asked in training."""

    model: PeftModel | nn.Module
    processor: Processor
    framing: Framing
    trained: bool = False
    """Whether the framing is that of a training; otherwise nothing is known of one."""
    task: Task = "causal-lm"
    task_names: Sequence[str] = ()
    """Of the tasks that its adapters tell apart, by number; none where the training knew them by number."""

    def told(self, task: str | None) -> dict[str, list[int]]:
        """What a call of one row says of its task, by its name or number; None: nothing.

        Raises:
            ValueError: there is no such task, or what is active tells none apart, or a task is missing.
        """
        count = tasks_told(self.model)
        if task is None and count > 1:
            known = ", ".join(self.task_names) or f"a number from 0 to {count - 1}"
            raise ValueError(f"What is active tells {count} tasks apart: say which one with --task ({known}).")
        if task is None:
            return {}
        if not count:
            raise ValueError(f"--task {task} has no effect: nothing that is active tells tasks apart. Leave it out.")
        return {TASK: [number_of(task, self.task_names, count, "--task")]}

    @property
    def device(self) -> torch.device:
        """Where its input goes: where its first values are. What is offloaded has none."""
        every = [p.device for p in self.model.parameters()]
        return next((device for device in every if device.type != "meta"), torch.device("cpu"))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ValueError where the model takes images."""
        if not isinstance(self.processor, PreTrainedTokenizerBase):
            raise ValueError("This model takes images, not text. Ask it with: coadapt generate --image FILE")
        return self.processor

    @property
    def image_processor(self) -> BaseImageProcessor:
        """Raises ValueError where the model takes text."""
        if isinstance(self.processor, PreTrainedTokenizerBase):
            raise ValueError("This model takes text, not images. Ask it with: coadapt generate --prompt TEXT")
        return self.processor


def tasks_told(model: Any) -> int:
    """How many tasks what is active tells apart; 0: none."""
    if not isinstance(model, PeftModel):
        return 0
    return routing.tasks([model.composition], {name: model.get_adapter(name) for name in model.peft_config})


def asking(processor: Processor) -> str:
    """The options of `coadapt generate` that put something to such a model."""
    return "--prompt …" if isinstance(processor, PreTrainedTokenizerBase) else "--image …"


def base_of(adapter: Path) -> str | None:
    """The base that an adapter folder, or a Trainer's checkpoint of a view, names."""
    return next((str(name) for said in _configs(adapter) if (name := said.get("base_model_name_or_path"))), None)


def _configs(adapter: Path) -> list[Mapping[str, Any]]:
    """What the folder says of its adapters; nothing where it holds none."""
    try:
        return [facts.config for facts in read_facts(adapter).adapters]
    except FileNotFoundError:
        return []


def load(
    model: str | None,
    adapter: Path | None,
    adapters: str | None = None,
    *,
    device: torch.device | None = None,
    quantised: bool = True,
    on_disk: Path | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> Ready:
    """The base (the adapter's own where `model` is None), with the adapter folder, of which `adapters` is active.

    `adapter` can be a repository of the hub, USER/NAME, where there is no such folder.
    Both are put on `device`; None: on the best one that there is.

    Args:
        quantised: a base that was quantised for the training is quantised now, too.
        on_disk: an empty folder; the base's weights stay on disk, there or in its own files.
        device_map: of transformers, where the base is to lie on more than one device; in place of `device`.

    Raises:
        ValueError: no base is named, or the folder does not fit it; or its weights cannot wait on disk.
        FileNotFoundError: there is no such folder.
    """
    device = best() if device is None else device
    adapter = None if adapter is None else place_of(str(adapter))
    ready = load_bare(model, adapter, quantised=quantised, device=device, on_disk=on_disk, device_map=device_map)
    if adapter is None:
        return ready if device_map else replace(ready, model=ready.model.to(device))
    grow(ready.model, adapter, on_disk is not None)
    view = PeftModel.from_pretrained(ready.model, adapter)
    if adapters is not None:
        view.set_adapter(adapters)
    if on_disk is not None or device_map:
        return replace(ready, model=view.eval())
    return replace(ready, model=view.to(device).eval())


def grow(base: Any, adapter: Path, on_disk: bool = False) -> None:
    """Makes room for the tokens that an adapter brings: this base is nobody else's."""
    needed = rows_needed(adapter, base)
    if needed and needed > (rows := len(base.get_input_embeddings().weight)):
        if on_disk:
            raise ValueError(
                f"{adapter} brings {needed - rows} tokens more than the base's {rows}, for which a base on disk cannot "
                "make room. Leave --stream out, or resize the base first and save it."
            )
        warnings.warn(
            f"{adapter} brings {needed - rows} tokens more than the base's {rows}: it is resized.", stacklevel=2
        )
        base.resize_token_embeddings(needed, mean_resizing=False)


def load_bare(
    model: str | None,
    adapter: Path | None,
    *,
    quantised: bool = True,
    device: torch.device | None = None,
    on_disk: Path | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> Ready:
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
    kept = adapter is not None and any((adapter / n).is_file() for n in PROCESSORS)
    processor = load_processor(str(adapter) if kept else name, task)
    told = _provenance(adapter if adapter is not None else Path(name))  # a merged model keeps its adapter's
    # Where nothing is known of its training, a prompt is taken as it is.
    framing = Framing(**told.get("prompt", {"separator": ""}))
    how: dict[str, Any] = {
        "processor": processor,
        "framing": framing,
        "trained": "prompt" in told,
        "task": task,
        "task_names": tuple(told.get("tasks", {}).get("names", ())),
    }
    spread = {"device_map": device_map} if device_map else None
    if adapter is None:
        return Ready(model=load_base(name, task, processor, spread=spread).eval(), **how)
    quantisation = told.get("quantisation") if quantised else None
    if quantisation and device_map:
        raise ValueError(f"{adapter} was trained on a quantised base, with which device_map was never tried.")
    if on_disk is not None and (quantisation or getattr(config, "quantization_config", None)):
        raise ValueError(
            "This adapter was trained on a quantised base, which is not merged weight by weight. Leave --stream out."
        )
    base = load_base(
        name,
        task,
        processor,
        classes=told.get("data", {}).get("classes", ()),
        quantisation=quantisation,
        device=device,
        on_disk=on_disk,
        spread=spread,
    )
    return Ready(model=base.eval(), **how)


def _task_of(adapter: Path) -> Task | None:
    return next((TASKS[str(kind)] for said in _configs(adapter) if (kind := said.get("task_type")) in TASKS), None)


def framing_of(adapter: Path) -> Framing | None:
    """How prompts were put to an adapter in its training; None where its folder does not say.

    Raises:
        ValueError: the folder's record is damaged.
    """
    told = _provenance(adapter).get("prompt")
    try:
        return None if told is None else Framing(**told)
    except TypeError as error:
        raise ValueError(f"{adapter / PROVENANCE} is damaged: {error}") from error


def _provenance(adapter: Path) -> dict[str, Any]:
    file = adapter / PROVENANCE
    return read_json(file) if file.is_file() else {}
