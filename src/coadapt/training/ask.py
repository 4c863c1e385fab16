"""One prompt, one answer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from coadapt.data.images import opened
from coadapt.data.tokens import end_tokens, pad_token, words_as_tokens
from coadapt.model import PeftModel
from coadapt.training.load import Ready


def answer(
    ready: Ready,
    text: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 42,
    raw: bool = False,
    task: str | None = None,
) -> str:
    """What the model says to `text`, without the prompt and without special tokens; its class, from a classifier; its
    words (parted by white space) as `word/tag`, from a classifier of tokens.

    `temperature` 0 takes the likeliest token; otherwise tokens are drawn, the same for the same `seed`. `task` is the
    name or the number of the task that is asked, where adapters tell tasks apart.
    """
    told = ready.told(task)
    if classifies(ready.model, "Token"):
        return _tagged(ready.model, ready.tokenizer, text.split(), told)
    asked = text if raw else ready.framing.prompt(text, ready.tokenizer)
    inputs = tokens(ready, asked, special=raw or ready.framing.style != "chat")
    if classifies(ready.model):
        return classify(ready, {**inputs, **told})
    return say(ready, {**inputs, **told}, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def tokens(ready: Ready, text: str, *, special: bool) -> dict[str, torch.Tensor]:
    """The text as a batch of one row, on the model's device; `special`: with the tokenizer's own first and last."""
    inputs = ready.tokenizer(text, return_tensors="pt", add_special_tokens=special)
    return {name: inputs[name].to(ready.device) for name in ("input_ids", "attention_mask")}


def answer_image(ready: Ready, file: Path, task: str | None = None) -> str:
    """The class of the image in a file; `task` as of `answer`.

    Raises:
        FileNotFoundError, ValueError: there is no such image, or the model takes text.
    """
    seen = ready.image_processor(opened(file), return_tensors="pt")
    inputs = {name: tensor.to(ready.device) for name, tensor in seen.items()}
    return classify(ready, {**inputs, **ready.told(task)})


@torch.no_grad()
def classify(ready: Ready, inputs: Mapping[str, Any]) -> str:
    """The class that a classifier finds."""
    model = cast(Any, ready.model)
    return str(model.config.id2label[int(model(**inputs).logits.argmax())])


@torch.no_grad()
def say(
    ready: Ready,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    hear: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """What the model goes on with.

    Args:
        hear: gets it piece by piece, less the white space around it. One beam then, whatever the model is set to.
        stopped: asked after each token; True ends it there.
    """
    model = cast(Any, ready.model)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    out = model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token(ready.tokenizer),
        eos_token_id=end_tokens(model.generation_config.eos_token_id, ready.tokenizer),
        **({} if hear is None else {"streamer": _Heard(ready.tokenizer, hear), "num_beams": 1}),
        stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
    )
    start = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return cast(str, ready.tokenizer.decode(out[0, start:], skip_special_tokens=True))


def classifies(model: nn.Module, what: str = "Sequence") -> bool:
    """Whether it answers with a class; with `what` "Token", with one for each token."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return f"For{what}Classification" in type(base).__name__


@torch.no_grad()
def _tagged(model: Any, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], told: Mapping[str, Any]) -> str:
    ids, firsts = words_as_tokens(words, tokenizer)
    logits = model(input_ids=torch.tensor([ids], device=model.device), **told).logits[0]  # (T, classes)
    tags = [
        model.config.id2label[int(logits[firsts[word]].argmax())] if word in firsts else "?"
        for word in range(len(words))
    ]
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))


class _Heard(TextStreamer):
    """Hands each piece on as soon as it is known how it is spelt, less the white space around the whole."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.hear, self.begun, self.held = hear, False, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        whole = self.held + text
        said = whole.rstrip() if self.begun else whole.strip()
        self.held = whole[len(whole.rstrip()) :]
        if said:
            self.begun = True
            self.hear(said)


class _Stopped(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.stopped(), device=input_ids.device)
