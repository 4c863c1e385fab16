"""A row that is served among others, which come and go, is written as `generate` writes it alone."""

import itertools
from typing import Any

import pytest

from coadapt import PeftModel
from coadapt.serving import writing
from coadapt.serving.engine import Engine
from coadapt.serving.request import Request
from laws.setting import EVERY, MAKE, config_of, fits, rest
from models import stir
from serving.asking import TOKENIZER, alone, asked, base, engine, nodes, prompt, several

LENGTHS, ANSWERS = (1, 12, 3, 7, 2, 20, 5), (9, 2, 17, 5, 1, 12)


def requests(names: list[str | None], count: int) -> list[Request]:
    """Prompts and answers of unequal lengths, each with an adapter of its own."""
    numbers = zip(range(count), itertools.cycle(names), itertools.cycle(LENGTHS), itertools.cycle(ANSWERS))
    return [
        Request(tokens=prompt(length, i), adapters=name, max_tokens=most, temperature=0, logprobs=0)
        for i, name, length, most in numbers
    ]


def holds(view: PeftModel, asking: list[Request], **options: Any) -> None:
    with engine(view, **options) as made:
        heard = asked(made, asking, pauses=(0, 0, 0.002, 0.005))
    for request, found in zip(asking, heard, strict=True):
        assert found.last.error is None
        assert found.tokens == alone(view, request), request
        assert found.last.finish == ("stop" if found.tokens[-1] == 2 else "length")


@pytest.mark.parametrize(
    "model", ["llama", "gpt2", "gemma3", "mistral", *rest("bloom", "opt", "gemma2", "qwen2", "qwen3", "mixtral")]
)
def test_greedy_rows_equal_those_alone(model: str) -> None:
    view, names = several(model), nodes(model)
    asking = requests(names, len(names) + 10)
    holds(view, asking, rows=7)
    written = {tuple(alone(view, Request(tokens=(9, 70, 80), adapters=n, max_tokens=6))) for n in names}
    assert len(written) > len(names) // 2  # adapters differ in what they write


@pytest.mark.parametrize("model", ["llama", *rest("gpt2", "gemma3", "bloom", "opt")])
def test_long_prompts_are_read_in_parts(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others are written; and short ones of one turn together."""
    monkeypatch.setattr(writing, "PREFILL", 8)
    monkeypatch.setattr("coadapt.serving.engine.PREFILL", 8)
    holds(several(model), requests(nodes(model), 20), rows=5)


REFUSED = {
    "a-lora": "active from an invocation on",
    "mtl-lora": "asks for the task of each row",
    "prompt-multitask": "asks for the task of each row",
    "poly": "asks for the task of each row",
    "reft": "counts from a text's end or beginning",
    "shadow": "keeps states of its own",
}
"""Methods that need to know more of a row than its cache holds, as the names of their cases begin."""


def test_every_method_is_served_or_refused_by_name() -> None:
    view = PeftModel(base("llama"))
    for i, case in enumerate(case for case in EVERY if fits(case, "llama")):
        view.add_adapter(case, config_of(case, "llama"))
        stir(view.get_adapter(case), seed=i, by=0.1)
    view.requires_grad_(False)
    view.eval()
    asking = [
        Request(tokens=prompt(4 + i % 3, i), adapters=name, max_tokens=4, temperature=0, logprobs=0)
        for i, name in enumerate(view.peft_config)
    ]
    with engine(view, rows=16) as made:
        heard = asked(made, asking)
    for request, found in zip(asking, heard, strict=True):
        why = next((why for case, why in REFUSED.items() if str(request.adapters).startswith(case)), None)
        if why is None:
            assert found.last.error is None, request.adapters
            assert found.tokens == alone(view, request), request.adapters
        else:
            assert found.last.finish == "refused", request.adapters
            assert why in str(found.last.error)
            assert "coadapt generate" in str(found.last.error)


def test_models_whose_rows_cannot_come_and_go() -> None:
    for model, why in (("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("bert", "writes no text")):
        with pytest.raises(ValueError, match=why):
            Engine(PeftModel(MAKE[model]()), TOKENIZER)
    view = several("llama")
    view.merge_adapter("lora")
    with pytest.raises(ValueError, match="unmerge_adapter"):
        Engine(view, TOKENIZER)
