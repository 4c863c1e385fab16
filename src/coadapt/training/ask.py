"""One prompt, one answer."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from coadapt.data.tokens import words_as_tokens
from coadapt.model import PeftModel
from coadapt.training.assemble import pad_token
from coadapt.training.load import Ready


@torch.no_grad()
def answer(
    ready: Ready, text: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 42, raw: bool = False
) -> str:
    """What the model says to `text`, without the prompt and without special tokens; its class, from a classifier; its
    words (parted by white space) as `word/tag`, from a classifier of tokens.

    `temperature` 0 takes the likeliest token; otherwise tokens are drawn, the same for the same `seed`.
    """
    model = cast(Any, ready.model)
    tokenizer = ready.tokenizer
    if _is_for("TokenClassification", ready.model):
        return _tagged(model, tokenizer, text.split())
    asked = text if raw else ready.framing.prompt(text, tokenizer)
    inputs = tokenizer(asked, return_tensors="pt", add_special_tokens=raw or ready.framing.style != "chat")
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    if _is_for("SequenceClassification", ready.model):
        return str(model.config.id2label[int(model(**inputs).logits.argmax())])
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    out = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token(tokenizer),
        eos_token_id=_ends(model.generation_config.eos_token_id, tokenizer),
    )
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return cast(str, tokenizer.decode(out[0, start:], skip_special_tokens=True))


def _is_for(task: str, model: nn.Module) -> bool:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return f"For{task}" in type(base).__name__


def _tagged(model: Any, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> str:
    ids, firsts = words_as_tokens(words, tokenizer)
    logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]  # (T, classes)
    tags = [
        model.config.id2label[int(logits[firsts[word]].argmax())] if word in firsts else "?"
        for word in range(len(words))
    ]
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))


def _ends(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The ends that the base knows, and the one that was trained."""
    ends = {known} if isinstance(known, int) else set(known or [])
    trained = cast(int | None, tokenizer.eos_token_id)
    return sorted(ends | {trained} if trained is not None else ends) or None
