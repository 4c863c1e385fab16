"""Activated LoRA: where it begins, with a cache and without, beside others, and as the field has it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from coadapt import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.core.invocation import last
from formats.field import CASES, far, field_loaded, field_quietly, stirred
from models import MODELS, ids, logits, stir

TOKENS = [28, 34]
"""In row 0 of `ids()` from its token 1 on, in no other."""


def view_of(model: str = "llama", **options: Any) -> PeftModel:
    options = {"alora_invocation_tokens": TOKENS, "task_type": "CAUSAL_LM", **options}
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **options)
    view = get_peft_model(MODELS[model](), config).eval()
    stir(view.adapters, by=0.3)
    return view


def test_the_last_occurrence_counts() -> None:
    tokens = torch.tensor([[1, 2, 1, 2, 3], [2, 1, 2, 2, 1], [3, 3, 3, 3, 3], [1, 1, 1, 1, 2]])
    assert last(tokens, (1, 2)).tolist() == [2, 1, -1, 3]
    assert last(tokens[:, :1], (1, 2)).tolist() == [-1] * 4


def test_before_it_and_without_it_there_is_the_base() -> None:
    view = view_of()
    out, base = logits(view), logits(view.base)
    assert torch.equal(out[1:], base[1:])
    assert far(out[0, :1], base[0, :1]) == 0
    assert all(far(out[0, t], base[0, t]) > 1e-3 for t in range(1, 7))
    plain = get_peft_model(MODELS["llama"](), LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")).eval()
    stir(plain.adapters, by=0.3)
    assert far(logits(plain)[0, 1:], out[0, 1:]) > 1e-3, "keys and values before it are the base's"


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_generation_is_the_same_with_a_cache_without_one_and_in_the_field(model: str, tmp_path: Path) -> None:
    view = view_of(model)
    view.save_pretrained(tmp_path)
    field = field_loaded(MODELS[model](), tmp_path)
    tokens = ids(2)
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = view.generate(input_ids=tokens, **options)
    assert torch.equal(cached, view.generate(input_ids=tokens, use_cache=False, **options))
    assert torch.equal(cached, field_quietly(lambda: field.generate(input_ids=tokens, **options)))
    assert not torch.equal(cached[0], view.base.generate(input_ids=tokens, **options)[0])
    beams = view.generate(input_ids=tokens, num_beams=3, **options)
    assert torch.equal(beams, view.generate(input_ids=tokens, num_beams=3, use_cache=False, **options))


def test_a_loop_of_ones_own_over_a_cache() -> None:
    view = view_of()
    tokens = ids(2)
    whole = view(input_ids=tokens).logits
    out = view(input_ids=tokens[:, :4], use_cache=True)
    made, cache = [out.logits], out.past_key_values
    for t in range(4, 7):
        out = view(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        made.append(out.logits)
    assert far(torch.cat(made, 1), whole) < 1e-5


def test_a_cache_of_the_base_goes_on_under_the_adapter() -> None:
    view = view_of()
    tokens = torch.cat([ids(1)[:, 5:], ids(1)], dim=1)
    whole = view(input_ids=tokens).logits
    out = view.base(input_ids=tokens[:, :3], use_cache=True)
    rest = view(input_ids=tokens[:, 3:], past_key_values=out.past_key_values).logits
    assert far(rest, whole[:, 3:]) < 1e-5


def test_behind_a_prompt_and_for_some_rows() -> None:
    view = view_of()
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=3))
    tokens = ids(1)
    both = view(input_ids=tokens, adapters="prompt + default").logits
    prompt = view(input_ids=tokens, adapters="prompt").logits
    assert far(both[:, :1], prompt[:, :1]) < 1e-6
    assert far(both[:, 1:], prompt[:, 1:]) > 1e-3
    twice = tokens.expand(2, -1)
    rows = view(input_ids=twice, adapter_names=["default", "__base__"]).logits
    assert far(rows[0], view(input_ids=tokens).logits[0]) < 1e-5
    assert far(rows[1], view.base(input_ids=tokens).logits[0]) < 1e-6


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="causal language model"):
        get_peft_model(MODELS["t5"](), LoraConfig(alora_invocation_tokens=[3]))
    with pytest.raises(ValueError, match="must be token ids, at least one"):
        LoraConfig(alora_invocation_tokens=[])
    with pytest.raises(ValueError, match="would act before the invocation"):
        LoraConfig(alora_invocation_tokens=[3], bias="all")
    with pytest.raises(ValueError, match="adapts linear layers"):
        get_peft_model(MODELS["llama"](), LoraConfig(alora_invocation_tokens=[3], target_modules=["embed_tokens"]))
    view = view_of()
    with pytest.raises(ValueError, match="Pass input_ids"):
        view(inputs_embeds=view.base.get_input_embeddings()(ids()))
    with pytest.raises(TypeError, match="ALoRA"):
        view.merge_and_unload()
    assert stirred(CASES["llama-alora"]).get_adapter("default").config.method == "ALORA"
