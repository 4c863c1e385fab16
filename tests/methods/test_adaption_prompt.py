"""LLaMA-Adapter: the paper's formula written out, also where the field has no support; what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coadapt import AdaptionPromptConfig, PeftModel, get_peft_model
from models import FAMILIES, bert, gpt2, llama, logits, mixtral, stir


def written_out(model: Any, tokens: Tensor, adapter: Any) -> list[Tensor]:
    """What the formula adds to each adapted attention of a Llama-like model, before its output projection."""
    added: list[Tensor] = []
    for part in adapter.parts:
        module, method = part.place.module, part.method
        dim, groups = module.head_dim, module.num_key_value_groups

        def hook(m: Any, args: Any, kwargs: Any, method: Any = method, dim: int = dim, groups: int = groups) -> None:
            x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
            q = m.q_proj(x).unflatten(-1, (-1, dim))
            q = m.q_norm(q) if hasattr(m, "q_norm") else q
            half = torch.cat([-q[..., dim // 2 :], q[..., : dim // 2]], dim=-1)
            q = q * cos[:, :, None] + half * sin[:, :, None]  # (B, T, H, D)
            k, v = (layer(method.P).unflatten(-1, (-1, dim)) for layer in (m.k_proj, m.v_proj))  # (N, H, D)
            k = m.k_norm(k) if hasattr(m, "k_norm") else k
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
            scores = torch.einsum("bthd,nhd->bthn", q, k) * m.scaling
            added.append(method.gate * torch.einsum("bthn,nhd->bthd", scores.softmax(-1), v).flatten(2))

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        adapter_removed = handle
        model(input_ids=tokens)
        adapter_removed.remove()
    return added


@pytest.mark.parametrize("make", [llama, FAMILIES["qwen3"], FAMILIES["gemma3"]])
def test_the_papers_formula(make: Any) -> None:
    base = make(attn_implementation="eager")
    view = get_peft_model(base, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    stir(view.adapters, by=0.5)
    tokens = torch.randint(3, 64, (2, 5))
    before: list[Tensor] = []
    last = base.model.layers[-1].self_attn.o_proj
    handle = last.register_forward_pre_hook(lambda m, args: before.append(args[0]))
    base(input_ids=tokens)
    view(input_ids=tokens)
    handle.remove()
    (expected,) = written_out(base, tokens, view.get_adapter("default"))
    torch.testing.assert_close(before[1] - before[0], expected, rtol=1e-5, atol=1e-6)


def test_it_sits_in_the_top_layers() -> None:
    view = get_peft_model(llama(num_hidden_layers=4), AdaptionPromptConfig(adapter_len=3, adapter_layers=2))
    paths = [part.place.path for part in view.get_adapter("default").parts]
    assert paths == ["model.layers.2.self_attn", "model.layers.3.self_attn"]
    named = get_peft_model(bert(), AdaptionPromptConfig(adapter_len=2, adapter_layers=1, target_modules="self"))
    assert [p.place.path for p in named.get_adapter("default").parts] == ["bert.encoder.layer.1.attention.self"]


def test_several_at_once_in_gpt2() -> None:
    """Behind the projection too, two are the sum of what each adds."""
    view = PeftModel(gpt2(num_hidden_layers=1))
    for name in "ab":
        view.add_adapter(name, AdaptionPromptConfig(adapter_len=3, adapter_layers=1))
    stir(view.adapters, by=0.5)
    seen: list[Tensor] = []
    handle = view.base.transformer.h[0].attn.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    for adapters in (None, "a", "b", "a + 0.5*b", "a >> b"):
        logits(view, adapters=adapters or [])
    handle.remove()
    base, a, b, weighted, both = seen
    torch.testing.assert_close(weighted, a + 0.5 * (b - base), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both, a + b - base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_len": 0, "adapter_layers": 1}, "adapter_len=0 must be a whole number"),
        ({"adapter_len": 2, "adapter_layers": 9}, "adapter_layers=9, and MixtralForCausalLM has 2 such layers"),
        ({"adapter_len": 2, "adapter_layers": 1, "target_modules": "attn"}, "which are called self_attn"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(mixtral(), AdaptionPromptConfig(**options))
