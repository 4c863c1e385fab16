"""What the rows of a run's batches are: read off its data, or off its settings where that is left open."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from coadapt.data.prepare import CLASSIFYING
from coadapt.data.tokens import IGNORED
from coadapt.training.assemble import check_sight, load_tokenizer, longest, task_of_model
from coadapt.training.material import Material
from coadapt.training.proof import ROWS
from coadapt.training.settings import RunConfig, Task

CLASSES = 2
"""Of a classification whose data is not known."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the rows of a batch are."""

    task: Task
    length: int = 0
    """Tokens of the longest; 0 for images."""
    target: int = 0
    """Of a text for an encoder-decoder, the tokens of the target."""
    padded: bool = True
    """Whether some are shorter than the longest; then attention takes a mask."""
    image: tuple[int, ...] = ()
    """(channels, H, W)"""
    vocabulary: int = 0
    classes: int = 0

    def batch(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """Random values of these shapes."""

        def drawn(most: int, *shape: int) -> Tensor:
            return torch.randint(max(most, 1), shape, device=device)

        if self.task == "image-classification":
            return {"pixel_values": torch.randn(rows, *self.image, device=device), "labels": drawn(self.classes, rows)}
        made = {"input_ids": drawn(self.vocabulary, rows, self.length)}
        if self.padded and rows > 1:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
            made["attention_mask"][0, -1] = 0
        match self.task:
            case "sequence-classification":
                made["labels"] = drawn(self.classes, rows)
            case "token-classification":
                made["labels"] = drawn(self.classes, rows, self.length)
            case "seq2seq":
                made["labels"] = drawn(self.vocabulary, rows, self.target)
            case _:
                made["labels"] = made["input_ids"].clone()
        if self.padded and rows > 1 and made["labels"].dim() == 2:
            made["labels"][0, -1] = IGNORED
        return made


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The rows that a run has batches of."""

    train: Rows
    held_out: Rows | None
    first: Rows
    """Those on which a step is tried first."""


def kinds(run: RunConfig, config: PreTrainedConfig, material: Material | None) -> Kinds:
    """The longest rows of the data, or those that the settings allow; `config` gets the head for them."""
    task = material.task if material else run.task or task_of_model(config) or "causal-lm"
    check_sight(run.model, config, task)
    classes = len(material.classes) if material else CLASSES
    if task in CLASSIFYING:
        config.num_labels = classes
        if task != "image-classification":
            config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    if task == "image-classification":
        alike = Rows(task=task, image=_image(run, config, material), classes=classes)
    else:
        alike = Rows(task=task, vocabulary=config.get_text_config().vocab_size, classes=classes)
    if material is None and task != "image-classification":
        length = _longest(run, config)
        alike = replace(alike, length=length, target=length if task == "seq2seq" else 0)
    if material is None or task == "image-classification":
        held_out = bool(run.eval_split) if material is None else material.evaluates
        return Kinds(train=alike, held_out=alike if held_out else None, first=alike)
    parts = [part.made for part in material.parts.values()]
    held_out = [part.held_out for part in parts if part.held_out is not None]
    return Kinds(
        train=_as_long(alike, [part.train for part in parts]),
        held_out=_as_long(alike, held_out) if held_out else None,
        first=_as_long(alike, [part.train.select(range(min(ROWS, len(part.train)))) for part in parts]),
    )


def _as_long(alike: Rows, parts: Sequence[Any]) -> Rows:
    """Rows as the longest of these."""
    lengths = [len(ids) for rows in parts for ids in rows["input_ids"]]
    targets = [len(ids) for rows in parts for ids in rows["labels"]] if alike.task == "seq2seq" else [0]
    padded = min(lengths) < max(lengths) or min(targets) < max(targets)
    return replace(alike, length=max(lengths), target=max(targets), padded=padded)


def _longest(run: RunConfig, config: PreTrainedConfig) -> int:
    """`max_length` as `train` finds it; a tokenizer that is not there has nothing to say."""
    if run.max_length is not None:
        return run.max_length
    try:
        tokenizer = load_tokenizer(run.model, run.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"max_length is not told, and model={run.model!r} has no tokenizer that says what it takes: give max_length"
        ) from error
    return longest(None, run.adapters.values(), config, tokenizer)


def _image(run: RunConfig, config: PreTrainedConfig, material: Material | None) -> tuple[int, ...]:
    """(channels, H, W)"""
    if run.max_length is not None:
        raise ValueError(f"max_length={run.max_length} has no effect on images. Leave it out.")
    if material is not None:
        return tuple(material.collator()([material.first.made.train[0]])["pixel_values"].shape[1:])
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(f"model={run.model!r} does not say how large its images are: give data.")
    height, width = (size, size) if isinstance(size, int) else size
    return (getattr(config, "num_channels", 3), height, width)
