"""What transformers offers for generation: an assistant, a static cache, a pipeline."""

import logging
import types
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, pipeline

from beside.conftest import Make
from laws.setting import attach, ids, rest
from laws.test_generation import writer

STEPS = 8


def written(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    usual = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(tokens, attention_mask=mask, generation_config=usual, **options)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(ids(2))
    mask[0, :2] = 0
    return ids(2), mask


def assisted(view: Any, tokens: torch.Tensor, assistant: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the view writes, and what its assistant proposed on the way."""
    proposed: list[torch.Tensor] = []

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = type(assistant).generate(self, *args, **kwargs)
        if "assistant_model" not in kwargs:
            proposed.append(out if isinstance(out, torch.Tensor) else out.sequences)
        return out

    assistant.generate = types.MethodType(noted, assistant)
    try:
        return written(view, tokens, assistant_model=assistant), proposed
    finally:
        del assistant.generate


@pytest.mark.parametrize("case", ["lora", "bottleneck", "prefix", "prompt"])
@pytest.mark.parametrize("model", ["llama", *rest("gpt2", "opt", "gemma2", "gemma3", "qwen3", "mixtral")])
def test_the_base_assists_its_view(model: str, case: str) -> None:
    """Assisted decoding gives what greedy decoding gives; the base proposes what a copy of it without adapters does."""
    view = attach(writer(model), model, case, by=0.3)
    base: Any = view.get_base_model()
    tokens = ids(1)
    plain, alone = written(view, tokens), written(base, tokens)
    assert not torch.equal(plain, alone)
    by_base, by_copy = assisted(view, tokens, base), assisted(view, tokens, writer(model))
    assert torch.equal(by_base[0], plain)
    assert torch.equal(by_copy[0], plain)
    assert len(by_base[1]) == len(by_copy[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(by_base[1], by_copy[1], strict=True))
    assert torch.equal(written(base, tokens), alone)


def test_an_adapted_assistant_of_the_same_base() -> None:
    """Another view may assist: it uses its own adapters."""
    base = writer("llama")
    one, two = attach(base, "llama", "lora", by=0.3), attach(base, "llama", "prompt", "bottleneck", by=0.3)
    tokens = ids(1)
    assert torch.equal(written(one, tokens, assistant_model=two), written(one, tokens))


@pytest.mark.parametrize("case", ["lora", "bottleneck", "prefix", "prefix-decoupled"])
@pytest.mark.parametrize("model", ["llama", "gpt2", *rest("t5", "opt", "bart", "gemma2", "gemma3", "qwen3", "mixtral")])
def test_a_static_cache_equals_a_dynamic_one(model: str, case: str) -> None:
    view = attach(writer(model), model, case, by=2.0 if case == "prefix-decoupled" else 0.3)
    for tokens, mask in ((ids(2), None), padded()):
        dynamic = written(view, tokens, mask)
        assert torch.equal(written(view, tokens, mask, cache_implementation="static"), dynamic)
        assert not torch.equal(written(view.base, tokens, mask), dynamic)


@pytest.mark.parametrize("model", ["llama", *rest("gemma3")])
def test_a_prompt_refuses_a_static_cache_on_a_decoder(model: str) -> None:
    view = attach(writer(model), model, "prompt")
    with pytest.raises(ValueError, match="use the dynamic cache with prompts"):
        written(view, *padded(), cache_implementation="static")


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_a_prompt_before_an_encoder_takes_a_static_cache(model: str) -> None:
    view = attach(writer(model), model, "prompt", by=0.3)
    assert torch.equal(written(view, ids(2), cache_implementation="static"), written(view, ids(2)))


def test_a_pipeline_writes_what_the_view_writes(
    view_of: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    view = view_of("lora", "prompt", "prefix", by=0.5)
    with caplog.at_level(logging.CRITICAL):
        pipe: Any = pipeline("text-generation", model=view, tokenizer=tokenizer)
    asked = tokenizer("hello", return_tensors="pt")
    how = {"max_new_tokens": STEPS, "do_sample": False}
    for node in ("a + b + c", "a", []):
        view.set_adapter(node)
        said = pipe("hello", return_full_text=False, **how)[0]["generated_text"]
        new = view.generate(**asked, **how)[0, asked["input_ids"].shape[1] :]
        assert said == tokenizer.decode(new, skip_special_tokens=True)
        by_base = view.base.generate(**asked, **how)[0, asked["input_ids"].shape[1] :]
        assert torch.equal(new, by_base) == (node == [])
