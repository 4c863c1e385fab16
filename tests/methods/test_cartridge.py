"""Cartridges: started from a text they are that text; their first tokens stay; the field starts the same."""

from typing import Any

import peft
import pytest
import torch

from byte_tokenizer import byte_tokenizer
from coadapt import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from formats.field import field_quietly
from models import FAMILIES, gpt2, ids, llama, logits


@pytest.mark.parametrize("make", [llama, gpt2, FAMILIES["gemma3"], FAMILIES["qwen3"]])
@pytest.mark.parametrize("config", [CartridgeConfig, PrefixTuningConfig])
def test_started_from_a_cache_it_is_what_was_read(make: Any, config: Any) -> None:
    """The rest of a text has the scores that it has behind its beginning."""
    tokens = ids(1, 7)
    view = get_peft_model(make(), config(num_virtual_tokens=3))
    cache = view.get_base_model()(input_ids=tokens[:, :3], use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(view, past_key_values=cache)
    seen = 4 if make is FAMILIES["gemma3"] else 7  # its sliding window, which a prefix never leaves
    found = logits(view, tokens[:, 3:])[:, : seen - 3]
    torch.testing.assert_close(found, logits(make(), tokens)[:, 3:seen], rtol=1e-4, atol=1e-5)


def test_started_from_a_text_as_the_field_starts() -> None:
    tokenizer: Any = byte_tokenizer()
    base = llama(vocab_size=len(tokenizer))
    ours = get_peft_model(base, CartridgeConfig(num_virtual_tokens=4))
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = field_quietly(lambda: peft.get_peft_model(llama(vocab_size=len(tokenizer)), config))
    for template in (None, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"):
        tokenizer.chat_template = template
        initialize_kv_prefix_from_text(ours, tokenizer, text="The cat sleeps.")
        field_quietly(lambda: peft.initialize_kv_prefix_from_text(theirs, tokenizer, text="The cat sleeps."))
        expected = theirs.prompt_encoder["default"].weight.detach().view(4, 2, 2, 2, 8)  # (N, layers, 2, H, D)
        for layer, part in enumerate(ours.get_adapter("default").parts):
            keys, values = part.method.prefix()  # type: ignore[operator]
            found = torch.stack([keys, values]).permute(2, 0, 1, 3).detach()
            torch.testing.assert_close(found, expected[:, layer], rtol=1e-5, atol=1e-5)


def test_the_first_tokens_stay() -> None:
    view = get_peft_model(llama(), CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=2))
    method: Any = view.get_adapter("default").parts[0].method
    before = [t.detach().clone() for t in method.prefix()]
    assert method.P.shape[0] == 2
    optimizer = torch.optim.SGD([p for p in view.parameters() if p.requires_grad], lr=1.0)
    view(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    for old, new in zip(before, method.prefix(), strict=True):
        assert torch.equal(old[:, :2], new[:, :2])
        assert bool((old[:, 2:] != new[:, 2:]).any())


def test_two_in_a_row_are_two_texts_and_combine_to_one_prefix() -> None:
    view = PeftModel(llama())
    for name in "ab":
        view.add_adapter(name, CartridgeConfig(num_virtual_tokens=3))
    view.set_adapter("a >> b")
    together = logits(view)
    view.combine("a >> b", "cat", adapter_name="c")
    torch.testing.assert_close(logits(view, adapters="c"), together, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    view = get_peft_model(llama(), CartridgeConfig(num_virtual_tokens=4))
    cache = view.get_base_model()(input_ids=ids(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="at least 4, 8"):
        initialize_kv_prefix_from_past_key_values(view, past_key_values=cache)
    with pytest.raises(ValueError, match="The text has 3 tokens"):
        initialize_kv_prefix_from_text(view, byte_tokenizer(), text="ab")
    view.add_adapter("lora", LoraConfig(r=2))
    with pytest.raises(ValueError, match="which has no cache"):
        initialize_kv_prefix_from_past_key_values(view, past_key_values=cache, adapter_name="lora")
    with pytest.raises(ValueError, match="must lie between 0 and the 3 tokens"):
        CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=4)
