"""One prompt, one answer."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from coadapt.model import PeftModel
from coadapt.training.assemble import pad_token
from coadapt.training.load import Ready


def answer(
    ready: Ready, text: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 42, raw: bool = False
) -> str:
    """What the model says to `text`, without the prompt and without special tokens; its class, from a classifier.

    `temperature` 0 takes the likeliest token; otherwise tokens are drawn, the same for the same `seed`.
    """
    asked = text if raw else ready.framing.prompt(text, ready.tokenizer)
    inputs = tokens(ready, asked, special=raw or ready.framing.style != "chat")
    if classifies(ready.model):
        return classify(ready, inputs)
    return say(ready, inputs, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def tokens(ready: Ready, text: str, *, special: bool) -> dict[str, torch.Tensor]:
    """The text as a batch of one row, on the model's device; `special`: with the tokenizer's own first and last."""
    inputs = ready.tokenizer(text, return_tensors="pt", add_special_tokens=special)
    device = cast(Any, ready.model).device
    return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def classify(ready: Ready, inputs: dict[str, torch.Tensor]) -> str:
    """The class that a classifier finds."""
    model = cast(Any, ready.model)
    return str(model.config.id2label[int(model(**inputs).logits.argmax())])


@torch.no_grad()
def say(
    ready: Ready, inputs: dict[str, torch.Tensor], *, max_new_tokens: int, temperature: float, seed: int, **more: Any
) -> str:
    """What the model goes on with; `more` is for transformers' `generate` (a streamer, a rule that stops it)."""
    model = cast(Any, ready.model)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    out = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token(ready.tokenizer),
        eos_token_id=_ends(model.generation_config.eos_token_id, ready.tokenizer),
        **more,
    )
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return cast(str, ready.tokenizer.decode(out[0, start:], skip_special_tokens=True))


def classifies(model: nn.Module) -> bool:
    """Whether it answers with a class."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "ForSequenceClassification" in type(base).__name__


def _ends(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ends that the base knows, and the one that was trained."""
    ends = {known} if isinstance(known, int) else set(known or [])
    trained = cast(int | None, tokenizer.eos_token_id)
    return sorted(ends | {trained} if trained is not None else ends) or None
