"""Prefix tuning: long inputs, which need no mask, and one output matrix for each site of a projected prefix."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import PeftModel, PrefixTuningConfig, get_peft_model
from coadapt.core import attention
from models import gpt2, llama, logits, qwen3, stir, vit

LONG = torch.randint(3, 64, (2, 70), generator=torch.Generator().manual_seed(3))
"""More than 16 tokens for each of the 3 virtual ones, and of a second prefix's 1."""


def prefixed(base: nn.Module) -> PeftModel:
    view = PeftModel(base)
    view.add_adapter("a", PrefixTuningConfig(num_virtual_tokens=3))
    view.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=1))
    stir(view.adapters, by=0.5)
    view.set_adapter("a")
    return view.eval()


def with_gradients(view: PeftModel, adapters: Any) -> list[Tensor]:
    out = logits(view, LONG, adapters=adapters)
    view.zero_grad()
    (out * torch.linspace(-1, 1, out.shape[-1])).square().mean().backward()
    return [out, *(p.grad for p in view.parameters() if p.grad is not None)]


@pytest.mark.parametrize("make", [llama, gpt2, qwen3])
@pytest.mark.parametrize("adapters", ["a", "a >> b", "a + 0.5*b"])
def test_long_inputs_are_attended_to_as_short_ones_are(make: Any, adapters: str, monkeypatch: Any) -> None:
    """In float64, against the same with a mask, and against attention written out, whose softmax is in fp32 (eager)."""
    found = with_gradients(prefixed(make().double()), adapters)
    monkeypatch.setattr(attention, "_LONG", 10**9)
    for kind, within in (("sdpa", 1e-9), ("eager", 1e-5)):
        other = with_gradients(prefixed(make(attn_implementation=kind).double()), adapters)
        for one, two in zip(found, other, strict=True):
            torch.testing.assert_close(one, two, rtol=within, atol=within / 10)


@pytest.mark.parametrize("tokens, masked", [(47, True), (48, False), (70, False)])
def test_a_long_causal_call_needs_no_mask(tokens: int, masked: bool, monkeypatch: Any) -> None:
    seen: list[bool] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def noted(*args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        seen.append(attn_mask is not None)
        return plain(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    logits(prefixed(llama()), LONG[:, :tokens])
    assert seen == [masked] * 2


def test_long_prompts_are_generated_from_with_a_cache_as_without() -> None:
    view = prefixed(llama())
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(LONG)}
    cached = view.generate(LONG, **options)
    assert torch.equal(cached, view.generate(LONG, **options, use_cache=False))
    tokens = LONG
    for _ in range(5):
        tokens = torch.cat([tokens, logits(view, tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, tokens)


def test_what_sees_everything_needs_no_mask_either() -> None:
    view = get_peft_model(vit(), PrefixTuningConfig(num_virtual_tokens=1))
    stir(view.adapters)
    pixels = torch.randn(1, 3, 8, 8)
    eager = get_peft_model(vit(attn_implementation="eager"), PrefixTuningConfig(num_virtual_tokens=1))
    eager.load_state_dict(view.state_dict())
    torch.testing.assert_close(view(pixel_values=pixels).logits, eager(pixel_values=pixels).logits)


def test_a_projected_prefix_is_the_papers_mlp() -> None:
    """P = W_2 tanh(W_1 E), section 4.3, here with the matrices of all sites as the one that they are in the paper."""
    view = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True))
    stir(view.adapters)
    adapter: Any = view.get_adapter("default")
    shared, sites = adapter.shared, [part.method for part in adapter.parts]
    weight = torch.cat([layer.weight for layer in shared.second])
    bias = torch.cat([layer.bias for layer in shared.second])
    whole = torch.tanh(shared.embedding @ shared.first.weight.mT + shared.first.bias) @ weight.mT + bias
    for i, site in enumerate(sites):
        both = whole.view(3, len(sites), 2, *site.shape[2:])[:, i]  # (N, 2, H, D)
        for found, expected in zip(site.prefix(), both.unbind(1), strict=True):
            torch.testing.assert_close(found, expected.transpose(0, 1))


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_of_zeros_changes_the_model_and_trains(projected: bool) -> None:
    view = get_peft_model(
        gpt2(), PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero", prefix_projection=projected)
    )
    for part in view.get_adapter("default").parts:
        keys, values = part.method.prefix()  # type: ignore[operator]
        assert not keys.any()
        assert not values.any()
    assert not torch.equal(logits(view), logits(gpt2()))
    logits(view).pow(2).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in view.parameters())
    with pytest.raises(ValueError, match="would never train"):
        PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero", prefix_type="decoupled")
