"""Routers in calls: rows, padding, caches, gradients, recomputation; no token knows of later ones."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from coadapt import (
    PooledRouter,
    Sum,
    TokenRouter,
)
from laws.routed import CASES, LORA, ROUTERS, made, one_layer, routed, told
from laws.setting import (
    MAKE,
    close,
    far,
    gradients,
    ids,
    logits,
    loss,
    recompute,
    same_gradients,
)
from laws.test_generation import writer, written

# ---- rows, tokens, time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", "bert", pytest.param("bart", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ROUTERS)
def test_a_row_of_a_batch_equals_it_alone_whatever_its_padding(kind: str, model: str) -> None:
    view = made(kind, model).eval().double()  # scores of an attention over changes are steep
    tokens, mask = ids(3), torch.ones(3, ids(3).shape[1], dtype=torch.long)
    tokens[1, 3:], mask[1, 3:] = 9, 0
    decoder = {"decoder_input_ids": tokens} if model in ("t5", "bart") else {}
    mixed = logits(view, tokens, attention_mask=mask, **decoder, **told(kind, [0, 1, 1]))
    for row, length in enumerate([tokens.shape[1], 3, tokens.shape[1]]):
        own = tokens[row : row + 1, :length]
        more = {"decoder_input_ids": tokens[row : row + 1]} if model in ("t5", "bart") else {}
        alone = logits(view, own, **more, **told(kind, [[0, 1, 1][row]]))[0]
        close(mixed[row] if model in ("t5", "bart", "bert") else mixed[row, :length], alone, 1e-5)
    far(mixed[0], logits(view.base, tokens, attention_mask=mask, **decoder)[0])


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_no_token_knows_of_later_ones(kind: str, model: str) -> None:
    view = made(kind, model).eval()
    tokens, other = ids(2), ids(2)
    other[:, -2:] = (other[:, -2:] + 5) % 60
    if model == "t5":
        one = logits(view, ids(2), decoder_input_ids=tokens, **told(kind, [0, 1]))
        two = logits(view, ids(2), decoder_input_ids=other, **told(kind, [0, 1]))
    else:
        one, two = logits(view, tokens, **told(kind, [0, 1])), logits(view, other, **told(kind, [0, 1]))
    close(one[:, :-2], two[:, :-2], 1e-6)
    far(one[:, -1], two[:, -1])


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", pytest.param("bart", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ROUTERS)
def test_cached_generation_equals_uncached(kind: str, model: str) -> None:
    view = made(kind, model, writer(model)).eval()
    tokens, mask = ids(3), torch.ones(3, ids(3).shape[1], dtype=torch.long)
    mask[1, :3] = 0
    own = told(kind, [0, 1, 1])
    cached = written(view, tokens, mask, do_sample=False, **own)
    assert torch.equal(cached, written(view, tokens, mask, do_sample=False, use_cache=False, **own))
    assert not torch.equal(cached, written(view.base, tokens, mask, do_sample=False))
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, **own}
    plain = written(view, tokens, mask, use_cache=False, **beams)
    if kind in ("pooled", "sigmoid"):
        with pytest.raises(ValueError, match="num_beams=3 with a cache"):
            written(view, tokens, mask, **beams)
        with pytest.raises(ValueError, match="num_beams=3 with a cache"):
            view.generate(tokens, GenerationConfig(num_beams=3), attention_mask=mask)
    else:
        assert torch.equal(plain, written(view, tokens, mask, **beams))


def test_the_mean_of_a_long_row_in_half_precision() -> None:
    """A cache goes on from sums and counts; 400 tokens are more than bf16 can count."""
    base = MAKE["llama"](num_hidden_layers=1, max_position_embeddings=512).bfloat16()
    view = routed("llama", PooledRouter(), "lora", "lora", base=base).eval()
    site: Any = view.gates[0].sites["/model/layers/0/self_attn/q_proj"]
    means: list[Tensor] = []
    site.network.register_forward_hook(lambda m, i, out: means.append(i[0]))
    tokens = ids(1).repeat(1, 60)[:, :400]
    with torch.no_grad(), view.running(None, None, (), {}):
        cache = view.base(tokens[:, :300], use_cache=True).past_key_values
        for t in range(300, 400):
            view.base(tokens[:, t : t + 1], past_key_values=cache)
        states = view.base.model.layers[0].input_layernorm(view.base.model.embed_tokens(tokens)).double()
    close(torch.cat(means, dim=1).double(), states.cumsum(1) / torch.arange(1, 401)[:, None], 1e-5)


@pytest.mark.parametrize("kind", ROUTERS)
def test_rows_with_and_without_a_router(kind: str) -> None:
    """adapter_names: one row uses the router, the others do not."""
    view = made(kind, "llama").eval()
    node = view.composition
    tokens, own = ids(4), told(kind, [1, 0, 0, 1])
    mixed = logits(view, tokens, adapter_names=[node, "a", None, node], **own)
    close(mixed[0], logits(view, tokens[:1], **told(kind, [1]))[0], 1e-5)
    close(mixed[1], logits(view, tokens[1:2], adapters="a")[0], 1e-5)
    close(mixed[2], logits(view.base, tokens[2:3])[0], 1e-5)
    close(mixed[3], logits(view, tokens[3:], **told(kind, [1]))[0], 1e-5)


@pytest.mark.parametrize("kind", ["token", "task", "arrow"])
def test_a_static_cache(kind: str) -> None:
    view = routed("llama", ROUTERS[kind](), "lora", "lora", base=writer("llama")).eval()
    tokens = ids(2)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": 5}
    how |= told(kind, [0, 1])
    expected = view.generate(tokens, **how)
    assert torch.equal(view.generate(tokens, cache_implementation="static", **how), expected)
    assert not torch.equal(expected, view.base.generate(tokens, **{k: v for k, v in how.items() if k != "task_ids"}))


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2", "bert", "plain"])  # Llama's norms compute in single precision
@pytest.mark.parametrize("kind", [k for k in ROUTERS if k != "arrow"])
def test_gradients_are_the_slopes(kind: str, model: str) -> None:
    """Along a random direction, in double precision, for routers and adapters together."""
    cases = ("lora", "bottleneck") if model == "plain" else CASES.get(kind, ("lora", "prefix", "lora"))
    view = routed(model, ROUTERS[kind](), *cases).double()
    own = told(kind, [0, 1, 1])
    loss(view, **own).backward()
    trained = [p for p in view.parameters() if p.requires_grad and p.grad is not None]
    assert {id(p) for p in view.gates.parameters()} <= {id(p) for p in trained}
    torch.manual_seed(0)
    directions = [torch.randn_like(p) for p in trained]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))
    ends: list[float] = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.add_(d, alpha=sign * 1e-6)
            ends.append(float(_double_loss(view, **own)))
            for p, d in zip(trained, directions, strict=True):
                p.add_(d, alpha=-sign * 1e-6)
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-4)


def _double_loss(view: Any, **options: Any) -> Tensor:
    out = logits(view, **options).double()
    return (out * torch.linspace(-1, 1, out.shape[-1]).double()).pow(2).sum() / len(out)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    view = made(kind, "llama").train()
    own = told(kind, [0, 1, 1])
    expected = loss(view, **own)
    expected.backward()
    before, used = gradients(view), copy.deepcopy(dict(view.gates.named_buffers()))
    recompute(view, reentrant)
    again = loss(view, **own)
    again.backward()
    close(again, expected)
    same_gradients(gradients(view), before)
    for name, buffer in view.gates.named_buffers():  # what is recomputed was counted already
        close(buffer, used[name] if name.endswith("of") else 2 * used[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_encoder_of_sounds_averages_what_it_did(reentrant: bool) -> None:
    """The decoder, which runs in between, notes nothing that its encoder would read in the backward."""
    view = routed("whisper", PooledRouter(), "bitfit", "bitfit").train()
    loss(view).backward()
    before = gradients(view)
    recompute(view, reentrant)
    loss(view).backward()
    same_gradients(gradients(view), before)


def test_routers_train_alone_and_learn_whom_to_choose() -> None:
    """Tokens below 0 are worth adapter a's change, the others b's: the router finds out, the adapters stay."""
    view, _, _, _ = one_layer(LORA, LORA)
    view.set_adapter(Sum("a", "b", weights=TokenRouter(hidden=16)))
    view.freeze()
    before = copy.deepcopy(view.get_adapter("a").state_dict())
    optimizer = torch.optim.Adam(view.param_groups({"gates": 3e-2}))
    assert [g["name"] for g in optimizer.param_groups] == ["gates"]
    torch.manual_seed(3)
    for _ in range(300):
        x = torch.randn(16, 4, 6)
        with torch.no_grad():
            wanted = torch.where(x[..., :1] < 0, view(x, adapters="a"), view(x, adapters="b"))
        error = (view(x) - wanted).pow(2).mean()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    even_mix = (view(x, adapters="0.5*a + 0.5*b") - wanted).pow(2).mean()
    assert float(error.detach()) < 0.1 * float(even_mix.detach())
    assert all(torch.equal(before[k], v) for k, v in view.get_adapter("a").state_dict().items())
