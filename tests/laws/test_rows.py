"""Row b of a mixed batch equals that row alone, whatever its batch-mates and its padding."""

import functools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from laws.setting import MAKE, close, config_of, far, few, fits, ids, logits, pairs, rest, stir, view_on

ROWS = ["a", "b", None, "a + 0.5*b", "b >> a", "2*a"]


def alone(view: PeftModel, tokens: torch.Tensor, node: Any) -> torch.Tensor:
    return logits(view, tokens[None], adapters=node or [])[0]


@pairs(5)
def test_a_row_of_a_mixed_batch_equals_it_alone(case: str, model: str) -> None:
    other = next(c for c in ("lora", "prompt", "bottleneck") if c != case and fits(c, model))
    view = view_on(model, case, other, by=0.3)
    tokens = ids(len(ROWS))
    mixed = logits(view, tokens, adapter_names=ROWS)
    for row, node, expected in zip(mixed, ROWS, tokens, strict=True):
        close(row, alone(view, expected, node), 5e-6)
    far(mixed[0], logits(view.base, tokens)[0])


def many(model: str) -> PeftModel:
    """Prompts and prefixes of unequal lengths, and layer methods."""
    view = PeftModel(MAKE[model]())
    configs: dict[str, Any] = {
        "p2": PromptTuningConfig(num_virtual_tokens=2),
        "p3": PromptTuningConfig(num_virtual_tokens=3, prompt_sites=["encoder", "decoder"] if model == "t5" else None),
        "lora": LoraConfig(r=2),
        "serial": config_of("bottleneck", model),
    }
    if model != "bloom":
        configs["x2"], configs["x4"] = (
            PrefixTuningConfig(num_virtual_tokens=2),
            PrefixTuningConfig(num_virtual_tokens=4),
        )
        configs["apart"] = PrefixTuningConfig(num_virtual_tokens=1, prefix_type="decoupled")
    for i, (name, config) in enumerate(configs.items()):
        torch.manual_seed(i)
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=i)
    return view


together = functools.cache(many)
ABSOLUTE = ("bert", "bart")
"""Their own positions count padding on the left."""
COUNTED = ("llama", "gpt2", "gemma2", "gemma3", "qwen2", "qwen3", "mixtral")
"""They count it too, unless they are told positions."""
TEXTS = ["p2", "p3", "p3 >> p2", "lora", "lora + serial", "p2 >> lora", "0.5*lora >> p3"]
WITH_PREFIX = ["x2", "x4", "x2 >> x4", "x2 + lora", "p3 >> x4", "p2 + apart", "apart", "0.5*x2"]


def _rows(model: str) -> st.SearchStrategy[list[tuple[str | None, int]]]:
    texts = TEXTS if model == "bloom" else TEXTS + WITH_PREFIX
    row = st.tuples(st.one_of(st.none(), st.sampled_from(texts)), st.integers(2, 7))
    return st.lists(row, min_size=1, max_size=5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bloom", "t5", "bert", "opt", "bart", *rest(*COUNTED[2:])])
@few
@given(data=st.data())
def test_any_rows_of_any_lengths(model: str, side: str, data: st.DataObject) -> None:
    rows = data.draw(_rows(model))
    view, longest = together(model), max(n for _, n in rows)
    side = "right" if model in ABSOLUTE else side
    tokens, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    places = [slice(longest - n, longest) if side == "left" else slice(0, n) for _, n in rows]
    given_ids = [ids(1, n, seed=i)[0] for i, (_, n) in enumerate(rows)]
    for i, (place, own) in enumerate(zip(places, given_ids, strict=True)):
        tokens[i, place], mask[i, place] = own, 1
    extra: dict[str, Any] = {"attention_mask": mask}
    if model in COUNTED:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    decoder = ids(1, 4)
    if model in ("t5", "bart"):
        extra["decoder_input_ids"] = decoder.expand(len(rows), -1)
    with torch.no_grad():
        mixed = logits(view, tokens, adapter_names=[text for text, _ in rows], **extra)
        for out, (text, _), place, own in zip(mixed, rows, places, given_ids, strict=True):
            more = {"decoder_input_ids": decoder} if model in ("t5", "bart") else {}
            expected = logits(view, own[None], adapters=text or [], **more)[0]
            close(out if model in ("t5", "bart", "bert") else out[place], expected, 1e-5)


@pytest.mark.parametrize("model", ["whisper", "vit"])
def test_rows_of_what_is_no_text(model: str) -> None:
    view = PeftModel(MAKE[model]())
    configs: dict[str, Any] = {"x2": PrefixTuningConfig(num_virtual_tokens=2), "lora": LoraConfig(r=2)}
    if model == "whisper":
        configs |= {f"p{n}": PromptTuningConfig(num_virtual_tokens=n) for n in (2, 3)}
    for i, (name, config) in enumerate(configs.items()):
        torch.manual_seed(i)
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=i, by=0.3)
    names = [*configs, None, "x2 + 0.5*lora", *(["p3 >> p2", "x2 + p3"] if model == "whisper" else [])]
    tokens = ids(len(names))
    mixed = logits(view, tokens, adapter_names=names)
    for row, node, own in zip(mixed, names, tokens, strict=True):
        close(row, alone(view, own, node), 5e-6)


def test_a_decoder_that_counts_its_positions_takes_no_unequal_prompts() -> None:
    view = PeftModel(MAKE["bart"]())
    for n in (2, 3):
        view.add_adapter(f"p{n}", PromptTuningConfig(num_virtual_tokens=n, prompt_sites=["decoder"]))
    with pytest.raises(ValueError, match=r"prompts of one length in front of 'model\.decoder'"):
        logits(view, ids(2), adapter_names=["p2", "p3"])
    mixed = logits(view, ids(2), adapter_names=["p2", "p2"])
    close(mixed[1], alone(view, ids(2)[1], "p2"))


def test_the_number_of_rows_must_fit() -> None:
    view = view_on("llama", "lora")
    with pytest.raises(ValueError, match="2 entries, but the batch has 3 rows"):
        logits(view, adapter_names=["a", None])
    with pytest.raises(TypeError, match="Did you mean adapters="):
        logits(view, adapter_names="a")
