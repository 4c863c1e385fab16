"""The parts of a run: its task, its tokenizer, its base, and the adapters on it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

import coadapt.methods  # noqa: F401  makes the configurations known
from coadapt.config import CONFIGS, PeftConfig, TaskType
from coadapt.core.adapter import train_head
from coadapt.core.roles import word_embeddings
from coadapt.core.store import quantised
from coadapt.data.images import need_pillow
from coadapt.data.tokens import pad_token
from coadapt.model import PeftModel, get_peft_model
from coadapt.training.folder import AUTO_NAMES
from coadapt.training.options import check_needed, method_named
from coadapt.training.quantisation import quantised_loading
from coadapt.training.settings import AdapterSettings, RunConfig, Task
from coadapt.training.trainer import Rates

Processor = PreTrainedTokenizerBase | BaseImageProcessor
"""What makes a model's input."""
TASK_TYPES: Mapping[Task, TaskType] = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "sequence-classification": TaskType.SEQ_CLS,
    "token-classification": TaskType.TOKEN_CLS,
}
"""Those that the field has a name for; it has none for images."""
TASKS: Mapping[str, Task] = {str(value): key for key, value in TASK_TYPES.items()}
USUAL_LENGTH = 1024
"""Longest example where nothing else is said."""
ENDLESS = 10**9
"""Steps of a run that is measured and not carried out."""
POSITIONS = ("max_position_embeddings", "n_positions", "seq_length")
"""Names that model configurations have for the number of positions."""


def task_of_model(config: PreTrainedConfig) -> Task | None:
    """The task that a base alone decides; None where it could be more than one."""
    names = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return "sequence-classification"
    if any(name.endswith("ForTokenClassification") for name in names):
        return "token-classification"
    if config.is_encoder_decoder:
        return "seq2seq"
    if any(name.endswith("ForMaskedLM") for name in names):
        return "sequence-classification"
    return "image-classification" if takes_images(config) else None


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether transformers has an image classifier of this kind."""
    known = config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return known and not any(name.endswith("ForMaskedLM") for name in config.architectures or [])  # Perceiver is both


def check_sight(model: str, config: PreTrainedConfig, task: Task) -> None:
    """Raises a ValueError where the task is about images and the model is not, or the other way round."""
    if (task == "image-classification") != takes_images(config):
        takes = "images" if takes_images(config) else "no images"
        raise ValueError(
            f"task={task} does not go with model={model!r}: it is a {config.model_type}, which takes {takes}. "
            "Choose another model, or other data."
        )


def load_config(model: str, revision: str | None = None) -> PreTrainedConfig:
    """The base's configuration. Raises a ValueError that says what was looked for."""
    try:
        return AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={model!r} is no folder with a model, nor a model of the hub that can be reached: {error}"
        ) from error


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer."""
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model, revision=revision))


def load_processor(model: str, task: Task, revision: str | None = None) -> Processor:
    """What makes the model's input: its tokenizer, or its image processor.

    Raises:
        ValueError: the model has no image processor, or pillow, which reads images, is missing.
    """
    if task != "image-classification":
        return load_tokenizer(model, revision)
    need_pillow()
    try:
        return cast(BaseImageProcessor, AutoImageProcessor.from_pretrained(model, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={model!r} has no image processor (preprocessor_config.json), which says how large its images are "
            f"and how their values are scaled: {error}"
        ) from error


def longest(
    told: int | None, adapters: Iterable[AdapterSettings], config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> int:
    """`max_length`: as told, else the model's positions less those that virtual tokens take, at most 1024."""
    if told is not None:
        return told
    limits = [USUAL_LENGTH, *positions(config, tokenizer)]
    virtual = sum(int(a.options.get("num_virtual_tokens", 0)) for a in adapters)
    return max(min(limits) - virtual, 2)


def positions(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a base and its tokenizer say of the longest text, in tokens; empty where they say nothing."""
    known = [value for name in POSITIONS if (value := getattr(config, name, None))]
    return [*known, tokenizer.model_max_length] if tokenizer.model_max_length < 1e6 else known


def load_base(
    model: str,
    task: Task,
    processor: Processor,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    classes: Sequence[str] = (),
    quantisation: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    on_disk: Path | None = None,
    spread: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model as it is saved, with a head for `classes` where there are any.

    Args:
        quantisation: fields of transformers' BitsAndBytesConfig, by which it is quantised as it is loaded.
        device: where it is quantised, and stays; left out, transformers chooses.
        spread: `device_map` and `max_memory` of transformers, where the base is to lie on more than one device.
        on_disk: a folder for weights that are stored otherwise than the model has them; all weights stay on disk.
    """
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, **(spread or {})}
    if on_disk is not None:
        options |= {"device_map": {"": "disk"}, "offload_folder": str(on_disk)}
    if quantisation:
        options |= quantised_loading(model, quantisation, dtype=dtype, revision=revision, device=device)
    if classes:
        names = dict(enumerate(classes))
        options |= {"num_labels": len(names), "id2label": names, "label2id": {v: k for k, v in names.items()}}
        if isinstance(processor, PreTrainedTokenizerBase):
            options["pad_token_id"] = pad_token(processor)
        else:  # image classifiers come with a head for the classes that they were pretrained on
            options["ignore_mismatched_sizes"] = True
    base: nn.Module = getattr(transformers, AUTO_NAMES[task]).from_pretrained(model, **options)
    for _, module, store in quantised(base):
        store.steady(module)  # as below a view: also where it is asked by itself
    return base


def check_vocabulary(base: nn.Module, rows: Any, processor: Processor) -> None:
    """Raises ValueError where the data has tokens that the model has no embeddings for. It is not resized here."""
    ends = word_embeddings(base)
    known = len(ends[0].get_parameter("weight")) if ends else 0
    if not isinstance(processor, PreTrainedTokenizerBase) or not ends or len(processor) <= known:
        return
    if highest := max((i for row in rows for i in row["input_ids"] if i >= known), default=0):
        raise ValueError(
            f"The data has tokens that the model has no embeddings for, {processor.convert_ids_to_tokens(highest)!r} "
            f"among them: the tokenizer knows {len(processor)} tokens, the model {known}. Make room for them with "
            f"base.resize_token_embeddings({len(processor)}), save it, and train with that folder as --model."
        )


def adapter_config(
    name: str, adapter: AdapterSettings, task: Task, revision: str | None = None, seed: int | None = None
) -> PeftConfig:
    """The configuration object of an adapter's settings; `seed` is that of its start, where they have none.

    A schedule whose length is still open (see `RunConfig.with_steps`) has none that matters.

    Raises:
        ValueError: an option that has no default is missing, or one has a value that its method does not take.
    """
    method = method_named(adapter.method)
    options = {"init_seed": seed, **adapter.options} if seed is not None else adapter.options
    if "total_step" in method.names():
        options = {"total_step": ENDLESS, **options}
    check_needed(f"adapters.{name}", method, options)
    try:
        return CONFIGS[method.kind](**method.fixed, **options, task_type=TASK_TYPES.get(task), revision=revision)
    except TypeError as error:
        raise ValueError(f"adapters.{name}: {error}") from error


def attach(
    base: nn.Module,
    configs: Mapping[str, PeftConfig],
    composition: Any,
    new_head: bool = False,
    order: Sequence[str] | None = None,
) -> PeftModel:
    """A view of `base` with all adapters, of which `composition` (or their sum) is active.

    `new_head`: the head is new, and trained along, whatever the configurations say of the task. `order`: that in which
    they are attached, each after the one that it starts from.
    """
    if new_head:
        configs = {name: train_head(config, base) for name, config in configs.items()}
    first, *others = order or configs
    view = get_peft_model(base, configs[first], adapter_name=first)
    for name in others:
        view.add_adapter(name, configs[name])
    view.set_adapter(composition or (list(configs) if others else first))
    return view


def rates(run: RunConfig, view: PeftModel) -> dict[str, Rates]:
    """How each adapter, and the gates, are trained: by their own settings, else the run's.

    Raises:
        ValueError: a rate for gates, and none that trains.
    """

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    peak = run.peak_rates()
    found = {
        name: Rates(
            learning_rate=peak[name],
            warmup_steps=first(a.warmup_steps, run.warmup_steps),
            max_grad_norm=first(a.max_grad_norm, run.max_grad_norm),
            weight_decay=first(a.weight_decay, run.weight_decay),
            loraplus_lr_ratio=a.loraplus_lr_ratio,
            start_step=a.start_step or 0,
            stop_step=a.stop_step,
        )
        for name, a in run.adapters.items()
    }
    if any(group["name"] == "gates" for group in view.param_groups()):
        found["gates"] = Rates(
            learning_rate=first(run.gates_learning_rate, max(peak.values())),
            warmup_steps=run.warmup_steps,
            max_grad_norm=run.max_grad_norm,
        )
    elif run.gates_learning_rate is not None:
        raise ValueError(
            f"gates_learning_rate={run.gates_learning_rate:g} has no effect: nothing in the composition "
            f"{view.composition!r} is a gate that trains. Write one, as in token_router(a, b) or learned*a, or leave "
            "it out."
        )
    return found


def seed_everything(seed: int) -> None:
    """The generators that starts and dropout draw from."""
    torch.manual_seed(seed)
