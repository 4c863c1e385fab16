"""Generation with a cache equals generation without; each row equals that row alone, whatever it is padded with."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from laws.setting import EVERY, MAKE, attach, config_of, far, ids, logits, pairs, rest, stir
from models import sound

WRITERS = ("llama", "gpt2", "bloom", "t5", "opt", "bart", "gemma2", "gemma3", "qwen2", "qwen3", "mixtral")
TWO_STACKS = ("t5", "bart")
ABSOLUTE = ("bart",)
"""Their positions count padding on the left."""
STEPS = 5
HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


UNTIED = [case for case in EVERY if case != "lora-tied"]
"""Cases that need no tied head: a writer's is its own."""


def writer(model: str) -> Any:
    """A base whose next token depends on all before it: an untied head, larger weights."""
    spread: dict[str, Any] = {"initializer_range": 0.1 if model == "bloom" else 0.3}
    if model in ("t5", "opt", "bart"):
        spread = {"initializer_factor": 2.0} if model == "t5" else {"init_std": 0.5 if model == "bart" else 0.3}
    return MAKE[model](tie_word_embeddings=False, **spread)


def written(view: Any, tokens: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """What is generated after the prompt, (rows, STEPS)."""
    torch.manual_seed(7)
    mask = torch.ones_like(tokens) if mask is None else mask
    out = view.generate(tokens, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, **options)
    assert isinstance(out, Tensor)
    return out[:, 1:] if view.config.is_encoder_decoder else out[:, tokens.shape[1] :]


def ragged(*lengths: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of these lengths, then the same padded on the left, and their mask."""
    rows = [ids(1, n, seed=i)[0] for i, n in enumerate(lengths)]
    padded = torch.stack([torch.nn.functional.pad(r, (max(lengths) - len(r), 0)) for r in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), (max(lengths) - len(r), 0)) for r in rows])
    return rows, padded, mask


@pytest.mark.parametrize("how", HOW)
@pairs(0, UNTIED, WRITERS)
def test_cached_equals_uncached(case: str, model: str, how: str) -> None:
    view = attach(writer(model), model, case, "lora", by=0.3)
    cached = written(view, ids(), **HOW[how])
    assert torch.equal(cached, written(view, ids(), use_cache=False, **HOW[how]))
    assert not torch.equal(cached, written(view.base, ids(), **HOW[how]))
    assert len(cached.unique()) > 1 or model == "bart"  # which repeats itself


@pairs(1, UNTIED, WRITERS)
def test_greedy_equals_taking_the_best_token_again_and_again(case: str, model: str) -> None:
    view = attach(writer(model), model, case, by=0.3)
    tokens = ids()
    two = model in TWO_STACKS
    out = torch.full((3, 1), view.config.decoder_start_token_id) if two else tokens
    for _ in range(STEPS):
        scores = logits(view, tokens, decoder_input_ids=out) if two else logits(view, out)
        scores[:, -1, view.config.eos_token_id] = -torch.inf  # the end is not allowed before STEPS tokens
        out = torch.cat([out, scores[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written(view, tokens, do_sample=False), out[:, -STEPS:])


@pytest.mark.parametrize("how", ["greedy", "beams"])
@pairs(2, UNTIED, [model for model in WRITERS if model not in ABSOLUTE])
def test_a_padded_row_equals_it_alone(case: str, model: str, how: str) -> None:
    view = attach(writer(model), model, case, by=0.3)
    rows, padded, mask = ragged(4, 7, 2)
    together = written(view, padded, mask, **HOW[how])
    each = torch.cat([written(view, row[None], **HOW[how]) for row in rows])
    assert torch.equal(together, each)


NAMES: dict[str, Any] = {
    "p": PromptTuningConfig(num_virtual_tokens=2),
    "long": PromptTuningConfig(num_virtual_tokens=5),
    "x": PrefixTuningConfig(num_virtual_tokens=3),
    "lora": LoraConfig(r=4),
}
ROWS = ["p", "x", None, "long >> lora", "lora", "p + x", "p >> long"]


def several(model: str) -> PeftModel:
    """Adapters of every kind and of unequal lengths."""
    view = PeftModel(writer(model))
    for i, (name, config) in enumerate({**NAMES, "serial": config_of("bottleneck", model)}.items()):
        torch.manual_seed(i)
        if name != "x" or model != "bloom":
            view.add_adapter(name, config)
            stir(view.get_adapter(name), seed=i, by=0.3)
    return view


@pytest.mark.parametrize("use_cache", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("model", [*WRITERS[:4], *rest(*WRITERS[4:])])
def test_each_row_with_adapters_of_its_own(model: str, how: str, use_cache: bool) -> None:
    """Rows and adapters of unequal lengths in one batch."""
    view = several(model)
    names = [n for n in [*ROWS, "serial"] if n is None or "x" not in n or model != "bloom"]
    rows, padded, mask = ragged(*[4 + (0 if model in ABSOLUTE else i % 3) for i in range(len(names))])
    options = {**HOW[how], "use_cache": use_cache}
    together = written(view, padded, mask, adapter_names=names, **options)
    repeats = HOW[how].get("num_return_sequences", 1)
    assert len(together) == len(names) * repeats
    if how == "sampled":  # the draws of a batch are its own; what they are drawn from is tested above
        assert torch.equal(
            together, written(view, padded, mask, adapter_names=names, **{**options, "use_cache": not use_cache})
        )
        return
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        assert torch.equal(
            together[i * repeats : (i + 1) * repeats], written(view, row[None], adapters=name or [], **options)
        ), name


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("model", [*WRITERS[:4], "bart", *rest("opt", *WRITERS[6:])])
def test_sampled_rows_follow_the_scores_of_their_own_adapter(model: str, beams: int, use_cache: bool) -> None:
    """Each returned sequence was drawn from what its row's own composition gives for it, alone and unpadded."""
    view, two = several(model), model in TWO_STACKS
    names = ["p", "lora", None, "x + 0.5*lora", "long >> serial"]
    names = [n for n in names if n is None or "x" not in n or model != "bloom"]
    rows, padded, mask = ragged(*[4 + (0 if model in ABSOLUTE else i % 3) for i in range(len(names))])
    torch.manual_seed(0)
    out: Any = view.generate(
        padded, attention_mask=mask, adapter_names=names, do_sample=True, num_beams=beams, num_return_sequences=2,
        max_new_tokens=3, min_new_tokens=3, top_k=0, output_logits=True, return_dict_in_generate=True,
        use_cache=use_cache,
    )  # fmt: skip
    assert len(out.sequences) == 2 * len(names)
    for i, sequence in enumerate(out.sequences):
        row, node = rows[i // 2], names[i // 2] or []
        if two:
            expected = logits(view, row[None], decoder_input_ids=sequence[None, :-1], adapters=node)[0, -3:]
        else:
            expected = logits(view, torch.cat([row, sequence[padded.shape[1] :]])[None, :-1], adapters=node)[0, -3:]
        if beams == 1:
            found = torch.stack([step[i] for step in out.logits])
        else:  # a sequence has gone from beam to beam
            way = out.beam_indices[i, :3]
            found = torch.stack([step[beam] for step, beam in zip(out.logits, way.tolist(), strict=True)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("how", ["greedy", "beams"])
@pytest.mark.parametrize("model", TWO_STACKS)
def test_each_row_behind_an_encoder_that_is_padded_on_the_right(model: str, how: str) -> None:
    """What encoders are padded on, as a rule; BART's positions are right there in rows of any length."""
    view = several(model)
    for name, sites in (("e", ["encoder"]), ("d", ["decoder"])):
        view.add_adapter(name, PromptTuningConfig(num_virtual_tokens=5, prompt_sites=sites))
        stir(view.get_adapter(name), seed=9, by=0.5)
    names = ["p", "x", None, "long >> lora", "serial", "e + x", *(["d >> lora", "e >> d"] if model == "t5" else [])]
    rows = [ids(1, 3 + i % 4, seed=i)[0] for i in range(len(names))]
    padded = torch.stack([torch.nn.functional.pad(r, (0, 6 - len(r))) for r in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), (0, 6 - len(r))) for r in rows])
    for use_cache in (True, False):
        together = written(view, padded, mask, adapter_names=names, use_cache=use_cache, **HOW[how])
        repeats = len(together) // len(names)
        for i, (name, row) in enumerate(zip(names, rows, strict=True)):
            expected = written(view, row[None], adapters=name or [], **HOW[how])
            assert torch.equal(together[i * repeats : (i + 1) * repeats], expected), name


@pytest.mark.parametrize("cases", [("lora", "prefix"), ("prompt", "bottleneck"), ("prompt", "prefix")])
def test_what_is_heard_is_written(cases: tuple[str, ...]) -> None:
    """Features in, tokens out: the same with a cache and without, and each row with adapters of its own."""
    base = MAKE["whisper"](init_std=0.3, tie_word_embeddings=False)
    view = attach(base, "whisper", *cases, by=0.3)
    heard = sound(ids(4))

    def told(model: Any, features: Tensor, **options: Any) -> Tensor:
        return model.generate(features, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, **options)

    cached = told(view, heard)
    assert torch.equal(cached, told(view, heard, use_cache=False))
    assert not torch.equal(cached, told(base, heard))
    rows = ["a", None, "a + b", "b"]
    mixed = told(view, heard, adapter_names=rows)
    for i, node in enumerate(rows):
        assert torch.equal(mixed[i : i + 1], told(view, heard[i : i + 1], adapters=node or [])), node


def test_the_base_generates_as_before_in_between() -> None:
    view = attach(writer("llama"), "llama", "prefix", "prompt", by=0.3)
    before = written(writer("llama"), ids(), do_sample=False)
    written(view, ids(), do_sample=False)
    assert torch.equal(written(view.base, ids(), do_sample=False), before)
    with view.disable_adapter():
        assert torch.equal(written(view, ids(), do_sample=False), before)
    far(logits(view), logits(view.base))
