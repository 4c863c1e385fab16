"""Prepared rows put to a model: the losses of what it should say, and what it says when it is asked.

Prompts are the tokens that training put before the answer, taken from the same examples, so that nothing of the frame
(template, separator, where tokens join) can differ.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coadapt.data.by_task import TASK
from coadapt.data.collate import Collator
from coadapt.data.tokens import IGNORED, Example, end_tokens, pad_token
from coadapt.evaluation.losses import row_losses, trained
from coadapt.evaluation.metrics import CLASSES, Metric, Response
from coadapt.model import PeftModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Exam:
    """Rows, what is wanted of each, and how they are put to a model."""

    rows: Sequence[Example]
    """As `prepare` makes them: `input_ids`, `attention_mask`, `labels`; of images, what `collate` takes."""
    task: str
    metrics: Sequence[Metric]
    tokenizer: PreTrainedTokenizerBase | None = None
    """None: the rows are images."""
    collate: Callable[[Sequence[Example]], dict[str, Tensor]] | None = None
    """Makes a batch; left out, by padding on the right, as in training."""
    batch_size: int = 8
    max_new_tokens: int = 128
    room: int | None = None
    """Tokens that the model takes beside virtual ones; None: any number."""
    classes: Sequence[str] = ()
    """Their names, where the rows have classes."""

    @cached_property
    def parts(self) -> Sequence[tuple[list[int], list[int]]]:
        """Of each row, the tokens that are asked and those that are wanted; none where nothing can be asked."""
        return [asked_and_wanted(row, self.task) for row in self.rows]

    @cached_property
    def wanted(self) -> Sequence[str]:
        """Of each row, the answer, the class, or the tags, as text."""
        if self.task in CLASSES:
            return [" ".join(self.classes[label] for label in _labels(row)) for row in self.rows]
        assert self.tokenizer is not None
        return [cast(str, self.tokenizer.decode(answer, skip_special_tokens=True)) for _, answer in self.parts]

    def asked(self, row: int) -> str:
        """What is asked, as text: the prompt, the text to classify, the file of an image; of plain text nothing."""
        if self.tokenizer is None:
            return str(self.rows[row]["image"])
        tokens = self.rows[row]["input_ids"] if self.task in CLASSES else self.parts[row][0]
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))

    @cached_property
    def batches(self) -> Sequence[Sequence[int]]:
        """Numbers of rows: long ones first, those of like length together.

        A row whose answer could be cut by the model's last position goes alone, or it would cut its batch-mates' too.
        """
        lengths = [len(row.get("input_ids", ())) for row in self.rows]
        order = sorted(range(len(self.rows)), key=lambda row: (-lengths[row], row))
        tight = [row for row in order if self._longest(row) < self.max_new_tokens]
        rest = [row for row in order if row not in set(tight)]
        return [
            *([row] for row in tight),
            *(rest[at : at + self.batch_size] for at in range(0, len(rest), self.batch_size)),
        ]

    def sit(self, view: PeftModel, composition: Any, batch: Sequence[int]) -> dict[int, Response]:
        """What `composition` (None: the base alone) makes of a batch: row -> response."""
        was = view.training
        view.eval()
        try:
            with torch.no_grad(), view.disable_adapter() if composition is None else view.using(composition):
                found = self._losses(view, batch) if self.needs_losses else [Response()] * len(batch)
                if self.needs_answers:
                    answers = self._answers(view, batch)
                    found = [replace(one, answer=answer) for one, answer in zip(found, answers, strict=True)]
        finally:
            view.train(was)
        return dict(zip(batch, found, strict=True))

    @property
    def needs_answers(self) -> bool:
        """Whether a metric compares answers."""
        return any(metric.generates for metric in self.metrics)

    @property
    def needs_losses(self) -> bool:
        """Whether a metric is about what should have been said."""
        return not all(metric.generates for metric in self.metrics)

    def __post_init__(self) -> None:
        if not self.needs_answers:
            return
        if empty := [number for number, (asked, wanted) in enumerate(self.parts) if not asked or not wanted]:
            raise ValueError(
                f"{len(empty)} of {len(self.rows)} rows have no prompt, or no answer, to compare by (the first: row "
                f"{empty[0]}). Take metrics that ask for no answer: perplexity, loss."
            )
        for metric in self.metrics:
            if strange := [text for text in self.wanted if not metric.judges(text)]:
                raise ValueError(
                    f"{metric.name} knows Latin letters and digits only, and {len(strange)} of {len(self.rows)} wanted "
                    f"answers have none ({strange[0].strip()[:40]!r} is the first). Take exact_match, or perplexity."
                )

    # ---- what it should say ------------------------------------------------------------------------------------------

    def _losses(self, view: PeftModel, batch: Sequence[int]) -> list[Response]:
        made = self._collated([self.rows[row] for row in batch])
        device = cast(Any, view).device
        inputs = {name: tensor.to(device) for name, tensor in made.items()}
        labels = inputs.pop("labels")
        if self.task == "seq2seq":
            base: Any = view.get_base_model()
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = cast(Any, view)(**inputs).logits
        losses, tokens = row_losses(logits, labels, self.task), trained(labels, self.task)
        found = zip(losses.tolist(), tokens.tolist(), strict=True)
        if self.task not in CLASSES:
            return [Response(loss=loss, tokens=int(n)) for loss, n in found]
        likeliest = logits.argmax(-1)
        right = likeliest.eq(labels).reshape(len(labels), -1).sum(1)  # labels that are ignored equal no class
        chosen = [one[label.ne(IGNORED)].reshape(-1).tolist() for one, label in zip(likeliest, labels, strict=True)]
        return [
            Response(loss=loss, tokens=int(n), right=int(r), answer=" ".join(str(self.classes[c]) for c in ids))
            for (loss, n), r, ids in zip(found, right.tolist(), chosen, strict=True)
        ]

    def _collated(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        if self.collate is not None:
            return self.collate(examples)
        assert self.tokenizer is not None
        return Collator(pad_token_id=pad_token(self.tokenizer))(examples)

    # ---- what it says ------------------------------------------------------------------------------------------------

    def _answers(self, view: PeftModel, batch: Sequence[int]) -> list[str]:
        assert self.tokenizer is not None
        prompts = [self.parts[row][0] for row in batch]
        longest = min(self._longest(row) for row in batch)
        told = [self.rows[row][TASK] for row in batch] if TASK in self.rows[batch[0]] else None
        left = self.task != "seq2seq"
        return answers(view, self.tokenizer, prompts, max_new_tokens=longest, left=left, task_ids=told)

    def _longest(self, row: int) -> int:
        """Tokens of an answer that there is room for."""
        if self.room is None or self.task != "causal-lm" or not self.needs_answers:
            return self.max_new_tokens
        return min(self.max_new_tokens, max(1, self.room - len(self.parts[row][0])))


def _labels(row: Example) -> list[int]:
    """Its class, or those of its words."""
    labels = row["labels"]
    return [labels] if isinstance(labels, int) else [label for label in labels if label != IGNORED]


def asked_and_wanted(row: Mapping[str, Any], task: str) -> tuple[list[int], list[int]]:
    """The tokens before the last answer of a row, and that answer's own.

    Of a language model's text without a prompt both are empty, as of rows with classes.
    """
    if task == "seq2seq":
        return list(row["input_ids"]), [token for token in row["labels"] if token != IGNORED]
    if task != "causal-lm":
        return [], []
    labels = list(row["labels"])
    end = max((at for at, label in enumerate(labels) if label != IGNORED), default=-1) + 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return list(row["input_ids"][:start]), list(row["input_ids"][start:end])


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    left: bool = True,
    task_ids: Sequence[int] | None = None,
) -> list[str]:
    """What a model goes on with, greedily, without prompts and special tokens.

    Args:
        prompts: token ids.
        left: pad on the left, as what goes on behind its prompt must; an encoder-decoder is padded as in training.
        task_ids: the task of each prompt, where adapters tell tasks apart.
    """
    longest, fill = max(map(len, prompts)), pad_token(tokenizer)
    gaps = [[0] * (longest - len(prompt)) for prompt in prompts]
    real = [[1] * len(prompt) for prompt in prompts]
    ids = [
        [fill] * len(gap) + list(p) if left else list(p) + [fill] * len(gap)
        for p, gap in zip(prompts, gaps, strict=True)
    ]
    mask = [gap + ones if left else ones + gap for gap, ones in zip(gaps, real, strict=True)]
    out = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=fill,
        eos_token_id=end_tokens(model.generation_config.eos_token_id, tokenizer),
        **({} if task_ids is None else {TASK: task_ids}),
    )
    start = 0 if model.config.is_encoder_decoder else longest
    return cast(list[str], tokenizer.batch_decode(out[:, start:], skip_special_tokens=True))


def virtual_tokens(view: PeftModel, names: Sequence[str]) -> int:
    """Positions that the virtual tokens of these adapters take, if all of them are used at once."""
    return sum(int(getattr(view.peft_config[name], "num_virtual_tokens", 0)) for name in names)
