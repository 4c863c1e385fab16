"""P13, P19: soft prompts and position ids; prefixes in every part of an encoder-decoder."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from coadapt import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from models import gpt2, ids, llama, logits, stir, t5
from steps import alone, error, loss

N = 4


def prompted(base: Any, **options: Any) -> tuple[PeftModel, Tensor]:
    view = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=N, **options))
    stir(view.adapters)
    return view, view.get_adapter("default").weight.view(N, -1)


def by_hand(base: Any, prompt: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """Embeddings joined by hand; the virtual tokens stand at 0 .. N-1, the real ones N further on than said."""
    embeds = torch.cat([prompt.expand(len(tokens), -1, -1), base.get_input_embeddings()(tokens)], dim=1)
    where = torch.cat([torch.arange(N).expand(len(tokens), -1), positions + N], dim=1)
    return base(inputs_embeds=embeds, position_ids=where).logits[:, N:]


@pytest.mark.parametrize("make_one", [llama, gpt2])
def test_p13_position_ids_are_respected(make_one: Callable[..., Any]) -> None:
    view, prompt = prompted(make_one())
    tokens = ids()
    plain, gaps = torch.arange(7).expand(3, -1), torch.tensor([0, 1, 2, 6, 7, 8, 12]).expand(3, -1)
    for positions in (plain, gaps):
        assert (
            error(logits(view, tokens, position_ids=positions), by_hand(make_one(), prompt, tokens, positions)) < 1e-6
        )
    assert error(logits(view, tokens), logits(view, tokens, position_ids=plain)) < 1e-6
    assert error(logits(view, tokens, position_ids=gaps), logits(view, tokens)) > 1e-4


@pytest.mark.parametrize("make_one", [llama, gpt2])
def test_p13_packed_sequences_equal_each_alone(make_one: Callable[..., Any]) -> None:
    view, _ = prompted(make_one())
    tokens = ids(2, 9)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, -1)
    packed = logits(view, tokens, position_ids=positions)
    apart = torch.cat([logits(view, tokens[:, :4]), logits(view, tokens[:, 4:])], dim=1)
    assert error(packed, apart) < 2e-6
    assert error(packed, logits(view, tokens)) > 1e-4


def test_p13_output_is_as_long_as_the_input(make: Callable[..., Any]) -> None:
    base = make()
    view, _ = prompted(base)
    out, plain = view(**inputs(base), output_hidden_states=True), base(**inputs(base), output_hidden_states=True)
    assert out.logits.shape == plain.logits.shape
    for name, value in plain.items():
        if "hidden_state" in name and not name.startswith("encoder"):
            shapes = [v.shape for v in value] if isinstance(value, tuple) else value.shape
            found = getattr(out, name)
            assert ([v.shape for v in found] if isinstance(found, tuple) else found.shape) == shapes


def inputs(base: Any) -> dict[str, Tensor]:
    return {"input_ids": ids(), **({"decoder_input_ids": ids()[:, :5]} if base.config.is_encoder_decoder else {})}


@pytest.mark.parametrize("make_one", [llama, gpt2])
def test_p13_longer_only_when_asked(make_one: Callable[..., Any]) -> None:
    view, _ = prompted(make_one(), output_virtual_tokens=True)
    short, _ = prompted(make_one())
    short.get_adapter("default").load_state_dict(view.get_adapter("default").state_dict())
    assert logits(view).shape[1] == 7 + N
    assert error(logits(view)[:, N:], logits(short)) < 1e-6


def test_p13_labels_need_no_padding() -> None:
    """The loss of a causal model is over the given labels, and equals the one by hand."""
    view, prompt = prompted(llama())
    tokens = ids()
    rows = by_hand(llama(), prompt, tokens, torch.arange(7).expand(3, -1))
    expected = torch.nn.functional.cross_entropy(rows[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert error(view(input_ids=tokens, labels=tokens).loss, expected) < 1e-6


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, **sizes, **heads)).eval().requires_grad_(False)  # type: ignore[arg-type]


def encoder_states(model: Any) -> Tensor:
    return model(input_ids=ids(), decoder_input_ids=ids()[:, :5]).encoder_last_hidden_state


@pytest.mark.parametrize("make_one", [t5, bart])
def test_p19_encoder_changes_and_every_block_learns(make_one: Callable[..., Any]) -> None:
    view = get_peft_model(make_one(), PrefixTuningConfig(num_virtual_tokens=N))
    stir(view.adapters)
    assert error(encoder_states(view), encoder_states(make_one())) > 1e-4
    loss(view).backward()
    blocks = dict(view.get_adapter("default").named_parameters())
    assert len(blocks) == 6  # two layers, each: encoder, decoder, cross
    for name, block in blocks.items():
        assert block.grad is not None, name
        keys, values = block.grad.unbind(1)
        assert keys.norm() > 0, f"{name}: keys get no gradient"
        assert values.norm() > 0, f"{name}: values get no gradient"


@pytest.mark.parametrize("make_one", [t5, bart])
@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_p19_sites_are_selectable(make_one: Callable[..., Any], site: str) -> None:
    """Only an encoder prefix changes encoder states; each site alone changes the output."""
    base = make_one()
    view = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=N, prefix_sites=[site]))
    stir(view.adapters)
    assert torch.equal(encoder_states(view), encoder_states(make_one())) is (site != "encoder")
    assert error(logits(view), logits(make_one())) > 1e-5
    whole = get_peft_model(make_one(), PrefixTuningConfig(num_virtual_tokens=N))
    stir(whole.adapters)
    own, all_of = (dict(v.get_adapter("default").named_parameters()) for v in (view, whole))
    assert len(own) == 2
    assert own.keys() < all_of.keys()


def test_p19_sites_together_are_the_whole() -> None:
    """Three adapters, one per site, with the blocks of a whole prefix give what that gives."""
    whole = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=N))
    stir(whole.adapters)
    view = get_peft_model(
        t5(), PrefixTuningConfig(num_virtual_tokens=N, prefix_sites=["encoder"]), adapter_name="encoder"
    )
    for site in ("decoder", "cross"):
        view.add_adapter(site, PrefixTuningConfig(num_virtual_tokens=N, prefix_sites=[site]))
    for site in ("encoder", "decoder", "cross"):
        view.get_adapter(site).load_state_dict(whole.get_adapter("default").state_dict(), strict=False)
    assert error(logits(view, adapters=["encoder", "decoder", "cross"]), logits(whole)) < 1e-6
    assert error(logits(alone(t5, view, "encoder")), logits(whole)) > 1e-4
