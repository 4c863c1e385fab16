"""SHADOW: the equations in their own slow way; its loss beside the task's; caches, packed rows, several at once."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coadapt import LoraConfig, PeftModel, PromptTuningConfig, ShadowConfig, Sum, get_peft_model
from laws.setting import recompute
from models import bert, gpt2, ids, llama, logits, opt, qwen2, stir, t5, vit

SMALL = ShadowConfig(r=3, shadow_alpha=0.7, shadow_dropout=0.0, init_weights=False)


def shadowed(base: Any = None, *more: Any, config: ShadowConfig = SMALL) -> PeftModel:
    """A view with adapters a, b ...; only a is active."""
    view = PeftModel(llama() if base is None else base)
    for name, each in zip("abc", (config, *more), strict=False):
        view.add_adapter(name, each)
        stir(view.get_adapter(name), seed=ord(name), by=0.3)
    view.set_adapter("a")
    return view.eval()


def first_state(view: PeftModel, name: str, tokens: Tensor) -> Tensor:
    """s(0), by a model of the architecture that has the small stack's weights."""
    source: Any = view.get_adapter(name).shared
    small = llama(num_hidden_layers=1).model
    small.load_state_dict(source.backbone.state_dict(), strict=False)
    return small(inputs_embeds=view.base.model.embed_tokens(tokens)).last_hidden_state


def by_the_paper(view: PeftModel, tokens: Tensor, *names: str, stacked: bool = False) -> Tensor:
    """Equations 1 to 7, block by block, for the sum of some adapters, or one on top of the other; a Llama's logits."""
    base: Any = view.get_base_model()
    body, h = base.model, base.model.embed_tokens(tokens)
    states = {name: first_state(view, name, tokens) for name in names}
    rotary = body.rotary_emb(h, position_ids=torch.arange(tokens.shape[1])[None])
    for number, block in enumerate(body.layers):
        methods: dict[str, Any] = {name: view.get_adapter(name).parts[number].method for name in names}
        given = h
        for name, m in methods.items():
            read = given if stacked else h
            given = given + 0.7 * (read - states[name]) @ m.W_down.weight.T @ m.W_up.weight.T
        with view.disable_adapter():
            h = block(given, position_embeddings=rotary)
        for name, m in methods.items():
            if m.T is not None:
                gate = torch.sigmoid(m.G(h))
                states[name] = (1 - gate) * states[name] + gate * m.T(h)
    return base.lm_head(body.norm(h))


@torch.no_grad()
def test_the_papers_equations() -> None:
    view = shadowed(None, SMALL)
    torch.testing.assert_close(logits(view), by_the_paper(view, ids(), "a"), rtol=1e-5, atol=1e-5)
    both = logits(view, adapters="a + b")
    torch.testing.assert_close(both, by_the_paper(view, ids(), "a", "b"), rtol=1e-5, atol=1e-5)
    stacked = logits(view, adapters="a >> b")
    torch.testing.assert_close(stacked, by_the_paper(view, ids(), "a", "b", stacked=True), rtol=1e-5, atol=1e-5)
    assert min(float((x - y).abs().max()) for x, y in ((both, stacked), (both, logits(view)))) > 0.01


@torch.no_grad()
def test_blocks_that_do_not_follow_each_other() -> None:
    """The state goes past a block that is left out."""
    base = llama(num_hidden_layers=3)
    view = shadowed(base, config=replace(SMALL, layers_to_transform=[0, 2]))
    whole = PeftModel(base, SMALL, "a").eval()
    there = view.get_adapter("a")
    assert [part.place.path for part in there.parts] == ["model.layers.0", "model.layers.2"]
    middle: Any = whole.get_adapter("a").parts[1].method
    whole.load_state_dict({k: v for k, v in view.state_dict().items() if k != "_extra_state"}, strict=False)
    middle.W_up.weight.zero_()
    middle.G[2].weight.zero_()
    middle.G[2].bias.fill_(-1e4)  # a gate of 0
    torch.testing.assert_close(logits(whole), logits(view), rtol=1e-5, atol=1e-5)


# ---- the loss beside the task's --------------------------------------------------------------------------------------


def own_loss(view: PeftModel, name: str, tokens: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Equation 8, over labels counted elsewhere."""
    scores = view.base.lm_head(first_state(view, name, tokens))[:, :-1].flatten(0, 1)
    return F.cross_entropy(scores, labels[:, 1:].flatten(), reduction="sum") / (counted[:, 1:] != -100).sum()


@pytest.mark.parametrize("in_tuple", [False, True])
def test_its_loss_is_added_while_it_trains(in_tuple: bool) -> None:
    view = shadowed(None, LoraConfig(r=2, init_lora_weights=False))
    labels = ids()
    labels[1, :4] = -100

    def loss(**options: Any) -> Tensor:
        return view(input_ids=ids(), labels=labels, return_dict=not in_tuple, **options)[0]

    plain, other = loss(), loss(adapters="b")
    view.train()
    expected = plain + 0.05 * own_loss(view, "a", ids(), labels, labels)
    torch.testing.assert_close(loss(), expected)
    torch.testing.assert_close(loss(adapters="b"), other)
    torch.testing.assert_close(loss(adapters="0*a + b"), other)
    mean = (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(loss(num_items_in_batch=2 * mean), expected / 2)


def test_its_loss_counts_the_rows_that_use_it() -> None:
    view = shadowed(None, SMALL)
    named = {"input_ids": ids(), "labels": ids(), "adapter_names": ["b", None, "a + b"]}
    plain = view(**named).loss
    of = {"a": ids()[2:], "b": ids()[[0, 2]]}
    expected = plain + sum(0.05 * own_loss(view, n, tokens, tokens, ids()) for n, tokens in of.items())
    view.train()
    torch.testing.assert_close(view(**named).loss, expected)


def test_its_loss_behind_a_prompt() -> None:
    """The state has the prompt's tokens too; labels are of the others."""
    view = shadowed(None, PromptTuningConfig(num_virtual_tokens=3))
    view.set_adapter("a + b")
    plain = view(input_ids=ids(), labels=ids()).loss
    prompt = view.get_adapter("b").parts[0].method.prompt().expand(3, -1, -1)
    source: Any = view.get_adapter("a").shared
    small = llama(num_hidden_layers=1).model
    small.load_state_dict(source.backbone.state_dict(), strict=False)
    embeds = torch.cat([prompt, view.base.model.embed_tokens(ids())], 1)
    scores = view.base.lm_head(small(inputs_embeds=embeds).last_hidden_state[:, 3:])[:, :-1]
    view.train()
    more = view(input_ids=ids(), labels=ids()).loss - plain
    torch.testing.assert_close(more, 0.05 * F.cross_entropy(scores.flatten(0, 1), ids()[:, 1:].flatten()))


def test_without_its_loss_the_small_stack_learns_through_the_blocks_alone() -> None:
    view = shadowed(config=replace(SMALL, auxiliary_loss_weight=0.0))
    plain = view(input_ids=ids(), labels=ids()).loss
    torch.testing.assert_close(view.train()(input_ids=ids(), labels=ids()).loss, plain)
    plain.backward()
    assert all(p.grad is not None for p in view.get_adapter("a").parameters())


# ---- rows and caches -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
def test_packed_texts_do_not_see_each_other(make: Callable[..., Any]) -> None:
    view = shadowed(make(), SMALL)
    one, two = ids(1, 4, seed=1), ids(1, 5, seed=2)
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]
    for adapters in ("a", "0.5*a + b"):
        packed = view(
            input_ids=torch.cat([one, two], 1), position_ids=positions, use_cache=False, adapters=adapters
        ).logits
        alone = torch.cat([logits(view, one, adapters=adapters), logits(view, two, adapters=adapters)], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, shadow_hidden_size=24, shadow_num_hidden_layers=2)])
def test_a_loop_of_ones_own_over_a_cache(config: ShadowConfig) -> None:
    """Token by token, cut back, copied, rows picked, emptied: the small stack's layers follow the base's."""
    view = shadowed(None, SMALL, config=config)
    view.set_adapter("0.5*a + b")
    tokens, expected = ids(), logits(view)
    out = view(input_ids=tokens[:, :3], use_cache=True)
    cache = out.past_key_values
    kept = copy.deepcopy(cache)
    found = [out.logits]
    for t in range(3, 7):
        found.append(view(input_ids=tokens[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)
    cache.crop(-2)
    again = view(input_ids=tokens[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(again, expected[:, 5:], rtol=1e-5, atol=1e-5)
    kept.batch_select_indices(torch.tensor([2, 0]))
    picked = view(input_ids=tokens[[2, 0], 3:], past_key_values=kept).logits
    torch.testing.assert_close(picked, expected[[2, 0], 3:], rtol=1e-5, atol=1e-5)
    layers = len(cache.layers)
    cache.reset()
    anew = view(input_ids=tokens, past_key_values=cache).logits
    torch.testing.assert_close(anew, expected, rtol=1e-5, atol=1e-5)
    assert len(cache.layers) == layers


@torch.no_grad()
def test_a_block_runs_once_whatever_is_active() -> None:
    """Or it would write to its cache as often."""
    view = shadowed(None, SMALL)
    seen: list[Any] = []
    view.base.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    view(input_ids=ids(), adapters=Sum("a", "b", weights=[0.5, 2.0]), use_cache=True)
    view(input_ids=ids(), adapter_names=["a", None, "a >> b"], use_cache=True)
    assert len(seen) == 2


@torch.no_grad()
def test_a_cache_that_it_has_not_seen_is_refused() -> None:
    view = shadowed(None, SMALL)
    for before in ([], "b"):
        cache = view(input_ids=ids(), use_cache=True, adapters=before).past_key_values
        with pytest.raises(ValueError, match="The cache holds 7 tokens that came without this adapter"):
            view(input_ids=ids(length=1), past_key_values=cache)
    cache = view(input_ids=ids(), use_cache=True, adapters="a").past_key_values
    view(input_ids=ids(length=1), past_key_values=cache, adapters=[])
    with pytest.raises(ValueError, match="The cache holds 8 tokens"):
        view(input_ids=ids(length=1), past_key_values=cache)


def test_a_static_cache_and_a_mask_of_scores_are_refused() -> None:
    view = shadowed()
    with pytest.raises(ValueError, match="has no room for them: use the dynamic cache"):
        view.generate(ids(), max_new_tokens=3, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="needs an attention mask of shape"):
        view(input_ids=ids(), attention_mask=torch.zeros(3, 1, 7, 7))


@pytest.mark.parametrize("reentrant", [True, False])
def test_at_gate_0_it_does_not_run_and_gets_no_gradient(reentrant: bool) -> None:
    view = shadowed(None, LoraConfig(r=2, init_lora_weights=False))
    recompute(view, reentrant)
    view.train()(input_ids=ids(), adapter_names=["0*a", "b", None]).logits.sum().backward()
    assert all(p.grad is None for p in view.get_adapter("a").parameters())
    assert all(p.grad is not None for p in view.get_adapter("b").parameters())


# ---- what it is ------------------------------------------------------------------------------------------------------


def test_nothing_is_made_that_nothing_reads() -> None:
    view = shadowed(gpt2())
    source: Any = view.get_adapter("a").shared
    assert source.backbone.wte is None and source.without == "wte"
    assert view.get_adapter("a").parts[-1].method.T is None


def test_rotary_frequencies_are_not_rounded() -> None:
    view = PeftModel(llama().bfloat16(), SMALL, autocast_adapter_dtype=False)
    source: Any = view.get_adapter("default").shared
    assert {p.dtype for p in source.parameters()} == {torch.bfloat16}
    assert torch.equal(source.backbone.rotary_emb.inv_freq, llama().model.rotary_emb.inv_freq)


@torch.no_grad()
def test_an_embedding_of_its_own_reads_ids() -> None:
    apart = replace(SMALL, share_embeddings=False)
    view = shadowed(None, PromptTuningConfig(num_virtual_tokens=3), config=apart)
    with pytest.raises(ValueError, match="Pass input_ids"):
        view(inputs_embeds=view.base.model.embed_tokens(ids()))
    with pytest.raises(ValueError, match="use one that shares the model's embedding"):
        view(input_ids=ids(), adapters="a + b")
    shared: Any = shadowed()
    torch.testing.assert_close(logits(shared), shared(inputs_embeds=shared.base.model.embed_tokens(ids())).logits)


@pytest.mark.parametrize("make", [t5, bert, vit, lambda: llama().model])
def test_only_along_a_causal_language_model(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        get_peft_model(make(), ShadowConfig())
    if make is not vit:
        with pytest.raises(ValueError, match="causal language model"):
            get_peft_model(make(), ShadowConfig())


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (llama, {"target_modules": ["q_proj"]}, "is no block"),
        (gpt2, {"shadow_num_attention_heads": 5}, "5 attention heads fit"),
        (llama, {"shadow_num_attention_heads": 3}, "3 attention heads fit"),
        (lambda: opt(word_embed_proj_dim=16), {}, "embeds 16 features"),
        (llama, {"shadow_model": "some/model"}, "only 'mirror' is"),
        (llama, {"auxiliary_loss_weight": -1.0}, "must not be below 0"),
    ],
)
def test_what_does_not_fit_is_told(make: Callable[[], Any], options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        get_peft_model(make(), ShadowConfig(**options))


def test_it_cannot_be_merged() -> None:
    with pytest.raises(TypeError, match=r"Shadow at 'model\.layers\.0' is no map of weights"):
        shadowed().merge_adapter()
