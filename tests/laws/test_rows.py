"""Row b of a mixed batch equals that row alone, whatever its batch-mates and its padding."""

import functools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from laws.setting import (
    EVERY,
    MAKE,
    close,
    config_of,
    far,
    few,
    fits,
    ids,
    logits,
    pairs,
    rest,
    stir,
    view_on,
)  # fmt: skip

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


LAYERS = [case for case in EVERY if not case.startswith(("prompt", "p-tuning", "prefix"))]


@pairs(2, LAYERS, [model for model in MAKE if model != "mixtral"])
def test_rows_that_use_nothing_are_the_base_to_the_bit(case: str, model: str) -> None:
    """Whatever their batch-mates use. (A mixture's experts gather tokens of all rows, whose numbers move rounding.)"""
    others = [c for c in ("lora-all-linear", "bottleneck", "ia3") if c != case and fits(c, model)]
    view = view_on(model, case, *others, by=0.3)
    every = ["a", *("bcd"[: len(others)])]
    names = [None, "a", "__base__", " + ".join(every), "0*a", " >> ".join(f"{name}" for name in reversed(every))]
    tokens = ids(len(names))
    tokens[:, 1] = 7  # one of those that some case trains
    tokens[:, 2] = 28  # which invokes another
    mixed, base = logits(view, tokens, adapter_names=names), logits(view.base, tokens)
    for b in (0, 2, 4):
        assert torch.equal(mixed[b], base[b]), b
    for b in (1, 3, 5):
        far(mixed[b], base[b])


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


SITES: dict[str, Any] = {
    "pe": PromptTuningConfig(num_virtual_tokens=3, prompt_sites=["encoder"]),
    "pd": PromptTuningConfig(num_virtual_tokens=2, prompt_sites=["decoder"]),
    "xe": PrefixTuningConfig(num_virtual_tokens=2, prefix_sites=["encoder"]),
    "xd": PrefixTuningConfig(num_virtual_tokens=4, prefix_sites=["decoder"]),
    "xc": PrefixTuningConfig(num_virtual_tokens=1, prefix_sites=["cross"]),
    "le": LoraConfig(r=2, target_modules=r".*encoder.*\.(q|v|q_proj|v_proj)", init_lora_weights=False),
    "ld": LoraConfig(r=2, target_modules=r".*decoder.*\.(k|v|k_proj|v_proj)", init_lora_weights=False),
}


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_encoder_and_decoder_of_each_row_have_their_own(model: str) -> None:
    """Each half takes what is meant for it, in rows of unequal lengths on both sides."""
    view = PeftModel(MAKE[model]())
    for i, (name, config) in enumerate(SITES.items()):
        torch.manual_seed(i)
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=i, by=0.3)
    lone = {"t5": ["pd", "pe >> pd"], "bart": []}[model]  # BART's decoder takes prompts of one length only
    names = [None, "pe", "xe", "xd + xc", "le + 0.5*ld", "xe >> ld", "pe + xd", "0.5*xc + le", *lone]
    lengths = [3 + i % 4 for i in range(len(names))]
    tokens, mask = torch.zeros(len(names), 6, dtype=torch.long), torch.zeros(len(names), 6, dtype=torch.long)
    for i, n in enumerate(lengths):
        tokens[i, :n], mask[i, :n] = ids(1, n, seed=i)[0], 1
    decoder = ids(len(names), 5, seed=50)
    mixed = logits(view, tokens, attention_mask=mask, decoder_input_ids=decoder, adapter_names=names)
    for i, (name, n) in enumerate(zip(names, lengths, strict=True)):
        own = {"decoder_input_ids": decoder[i : i + 1]}
        expected = logits(view, tokens[i : i + 1, :n], adapters=name or [], **own)
        close(mixed[i], expected[0], 1e-5)
        if name is not None:
            far(expected, logits(view.base, tokens[i : i + 1, :n], **own))


def test_names_of_rows_that_are_none() -> None:
    """Each error says which row it is of, and nothing was changed."""
    view = view_on("llama", "lora", "prompt")
    before = logits(view)
    with pytest.raises(ValueError, match=r"adapter_names\[1\]: There is no adapter 'bb'. Did you mean 'b'\?"):
        logits(view, adapter_names=["a", "a + bb", None])
    with pytest.raises(TypeError, match=r"adapter_names\[2\]: A composition is a name.*got a int"):
        logits(view, adapter_names=["a", None, 3])
    with pytest.raises(ValueError, match=r"adapter_names\[0\]: 'a \+' is no composition"):
        logits(view, adapter_names=["a +", None, "b"])
    for wrong in ({"a": 1}, torch.tensor([0, 1, 0]), iter(["a", "b", "a"])):
        with pytest.raises(TypeError, match="adapter_names is a list with one composition for each row; got a"):
            logits(view, adapter_names=wrong)
    with pytest.raises(ValueError, match="not both"):
        logits(view, adapter_names=["a", "b", None], adapters="a")
    assert torch.equal(logits(view), before)


def test_the_number_of_rows_is_that_of_the_tokens() -> None:
    """Positions may be one row for all, wherever they stand."""
    view = view_on("llama", "lora", "prompt")
    positions = torch.arange(7)[None]
    mixed = view(position_ids=positions, input_ids=ids(), adapter_names=["a", None, "b"]).logits
    close(mixed, logits(view, adapter_names=["a", None, "b"]))


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_generation_takes_one_entry_for_each_row_it_is_given(model: str, how: dict[str, Any]) -> None:
    view, tokens = view_on(model, "lora"), ids(2)
    for names in (["a"], ["a"] * 4):
        with pytest.raises(ValueError, match=rf"{len(names)} entries, but the batch has 2 rows.*follow their row"):
            view.generate(tokens, attention_mask=torch.ones_like(tokens), adapter_names=names, max_new_tokens=2, **how)


def test_the_number_of_rows_must_fit() -> None:
    view = view_on("llama", "lora")
    with pytest.raises(ValueError, match="2 entries, but the batch has 3 rows"):
        logits(view, adapter_names=["a", None])
    with pytest.raises(TypeError, match="Did you mean adapters="):
        logits(view, adapter_names="a")
