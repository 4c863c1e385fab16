"""Routers kept, told and refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from coadapt import (
    Arrow,
    Fusion,
    Learned,
    LoraConfig,
    PeftModel,
    PooledRouter,
    PrefixTuningConfig,
    PromptTuningConfig,
    Seq,
    Sum,
    TaskRouter,
    TokenRouter,
)
from laws.routed import ROUTERS, made, routed, stirred, told
from laws.setting import (
    MAKE,
    close,
    ids,
    logits,
    loss,
    stir,
    view_on,
)

# ---- kept and told ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*ROUTERS, "per-layer"])
def test_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    view = made("token" if kind == "per-layer" else kind, "llama")
    if kind == "per-layer":
        view.set_adapter(Sum("a", "b", weights=[Learned(0.5, per_layer=True), 1.0]))
        stirred(view)
    own = told(kind, [0, 1, 1])
    loss(view.train(), **own).backward()  # training: what was used is counted
    expected = logits(view.eval(), **own)
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MAKE["llama"](), tmp_path)
    close(logits(again, **own), expected)
    assert repr(again.composition) == repr(view.composition)
    if kind != "per-layer":
        assert again.gates[0].usage() == view.gates[0].usage() != {}
    assert not any(p.requires_grad for p in again.parameters())
    if kind != "arrow":
        with pytest.raises(ValueError, match=r"Call unfreeze\('gates'\)"):
            again.param_groups({"gates": 1e-3})
        again.unfreeze("gates")
        assert [g["name"] for g in again.param_groups({"gates": 1e-3})] == ["gates"]
        again.freeze("gates")
    copied = copy.deepcopy(view)
    stir(view.gates, seed=3, by=1.0)
    close(logits(copied, **own), expected)
    state = again.state_dict()
    again.load_state_dict(state)
    close(logits(again, **own), expected)


@pytest.mark.parametrize("kind", ROUTERS)
def test_as_text(kind: str) -> None:
    view = made(kind, "llama")
    text = repr(view.composition)
    assert view.checked(text) is view.composition  # the one that is active, not a new one
    view.set_adapter(text)
    with pytest.raises(ValueError, match="would make new gates"):
        logits(view, adapters=f"2*a + {text}")
    other = PeftModel(MAKE["llama"]())
    for name, config in view.peft_config.items():
        other.add_adapter(name, config)
    other.set_adapter(text)
    assert repr(other.composition) == text
    assert len(other.gates) == 1


def test_what_was_used() -> None:
    """The mean gate of each child at each site, over real tokens only, and since it was last asked."""
    view = made("token", "llama").train()
    tokens, mask = ids(2), torch.ones(2, ids(2).shape[1], dtype=torch.long)
    mask[0, 4:] = 0
    seen: list[Tensor] = []
    site: Any = view.gates[0].sites["/model/layers/0/self_attn/q_proj"]
    handle = site.network.register_forward_hook(lambda m, i, out: seen.append(out.softmax(-1)))
    logits(view, tokens, attention_mask=mask)
    handle.remove()
    expected = seen[0][mask.bool()].mean(0)
    used = view.gates[0].usage()["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(torch.tensor(list(used.values())), expected.detach())
    first = view.gates[0].shares()
    assert list(first) == [0, 2]  # the prefix shares no site, so there is nothing to choose
    assert sum(first.values()) == pytest.approx(1.0, abs=1e-5)
    assert view.gates[0].shares() == {}
    logits(view.eval(), tokens)
    assert view.gates[0].shares() == {}  # counted while training
    other = TokenRouter()  # of one call
    logits(view, tokens, adapters=Sum("a", "c", weights=other))
    assert other.shares() == {}


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("top-1", ("lora", "prefix", "lora")),
        ("pooled", ("lora", "prefix", "lora")),
        ("task", ("lora", "prefix", "lora")),
        pytest.param("task", ("prompt", "prompt"), marks=pytest.mark.full),
        pytest.param("arrow", ("lora", "lora"), marks=pytest.mark.full),
        pytest.param("fusion", ("lora-all-linear", "lora-all-linear"), marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.full)])
def test_one_graph_whatever_is_chosen(kind: str, cases: Any, train: bool) -> None:
    torch.compiler.reset()
    view = routed("llama", ROUTERS[kind](), *cases, base=MAKE["llama"](num_hidden_layers=1)).train(train)
    counter = CompileCounter()
    compiled = torch.compile(view, fullgraph=True, backend=counter)
    for seed in range(3):
        tokens, mask = ids(3, seed=seed), torch.ones_like(ids(3))
        mask[seed, 4:] = 0
        own: Any = {"task_ids": torch.tensor([seed % 2, 1, 0])} if kind == "task" else {}
        with torch.set_grad_enabled(train):
            expected = logits(view, tokens, attention_mask=mask, **own)
            close(logits(compiled, tokens, attention_mask=mask, **own), expected, 1e-5)
    assert counter.frame_count == 1
    torch.compiler.reset()


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_bad_options() -> None:
    for make, match in (
        (lambda: TokenRouter("softmx"), "Did you mean 'softmax'"),
        (lambda: TokenRouter(top_k=0), "top_k=0"),
        (lambda: TokenRouter(temperature=0.0), "temperature=0.0"),
        (lambda: TokenRouter(hidden=-1), "hidden=-1"),
        (lambda: TaskRouter(0), "num_tasks=0"),
        (lambda: Fusion(values="no"), "values='no'"),  # type: ignore[arg-type]
        (lambda: Sum("a", weights=TokenRouter()), "its Sum has 1"),
        (lambda: Sum("a", "b", weights=TokenRouter(top_k=2)), "top_k=2 of 2 children"),
        (lambda: Learned(0.0), "above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("token_ruoter(a, b)", "no router 'token_ruoter'. Did you mean 'token_router'"),
        ("token_router(a, b, topk=1)", "no option 'topk'. Did you mean 'top_k'"),
        ("token_router(a, b, top_k=one)", "top_k='one'"),
        ("task_router(a, b)", "num_tasks"),
        ("token_router(a, nobody)", "no adapter 'nobody'"),
        ("lerned*a", "'lerned' before '.' is no number. Did you mean 'learned'"),
        ("a - learned*b", "above 0"),
        ("token_router(a b)", "was not expected"),
        ("token_router(a, b", "was not expected"),
    ],
)
def test_bad_texts(text: str, match: str) -> None:
    view = view_on("llama", "lora", "lora")
    with pytest.raises(ValueError, match=match):
        view.set_adapter(text)
    assert repr(view.composition) == "a + b"


def test_places_that_cannot_be() -> None:
    view = PeftModel(MAKE["llama"]())
    view.add_adapter("q", LoraConfig(target_modules=["q_proj"]))
    view.add_adapter("v", LoraConfig(target_modules=["v_proj"]))
    view.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=2))
    view.add_adapter("prefix2", PrefixTuningConfig(num_virtual_tokens=2))
    view.add_adapter("p", PromptTuningConfig(num_virtual_tokens=2))
    view.add_adapter("p2", PromptTuningConfig(num_virtual_tokens=2))
    for node, match in (
        (Sum("q", "v", weights=TokenRouter()), "no two of its adapters have a common site. Give it adapters"),
        (Sum("q", "v", weights=Fusion()), "no two of its adapters have a common site. Give it adapters"),
        (Sum("prefix", "prefix2", weights=Fusion()), "a prefix"),
        (Sum("prefix", "prefix2", weights=Arrow()), "reads the factors"),
        (Sum("p", "p2", weights=TokenRouter()), "stands before all of them"),
        (Sum("p", "p2", weights=PooledRouter()), "before the tokens that would decide"),
        (Sum("p", "p2", weights=TaskRouter(2, "sigmoid")), "virtual tokens of zeros"),
    ):
        with pytest.raises(ValueError, match=match):
            view.set_adapter(node)
    router = TokenRouter(activation="sigmoid")
    view.set_adapter(Sum("q", "v", weights=router))
    with pytest.raises(ValueError, match="one router in two places"):
        view.set_adapter(Seq(Sum("q", "v", weights=router), Sum("q", weights=router)))
    with pytest.raises(ValueError, match="made for other sites or adapters"):
        view.set_adapter(Sum("q", "prefix", weights=router))
    with pytest.raises(ValueError, match="chooses from"):
        view.delete_adapter("q")
    with pytest.raises(ValueError, match="router cannot be merged"):
        view.merge_adapter()
    with pytest.raises(ValueError, match="cannot become one adapter"):
        view.combine(view.composition, adapter_name="both")
    for name in ("e", "e2"):
        view.add_adapter(name, LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="one word or another"):
        view.set_adapter(Sum("e", "e2", weights=Arrow()))
    conv = view_on("conv", "lora", "lora")
    with pytest.raises(ValueError, match="a convolution"):
        conv.set_adapter(Sum("a", "b", weights=TokenRouter()))


def test_tasks_must_be_told_and_fit() -> None:
    view = made("task", "llama")
    for tasks, match in ((None, "needs task_ids"), ([0, 1], "2 entries, but the batch has 3"), ([0, 5, 1], "has 5")):
        with pytest.raises(ValueError, match=match):
            logits(view, task_ids=tasks)
    with pytest.raises(ValueError, match="task_ids has no effect"):
        logits(view, adapters="a", task_ids=[0, 1, 1])
    with view.disable_adapter():  # a batch goes with and without
        assert torch.equal(logits(view, task_ids=[0, 1, 1]), logits(view.base))
    states = view.base_model(ids(3), task_ids=[0, 1, 1]).last_hidden_state
    close(view.base.lm_head(states), logits(view, task_ids=[0, 1, 1]), 1e-6)


def test_a_pooled_router_refuses_what_it_cannot_average() -> None:
    view = made("pooled", "llama").eval()
    cache = view(ids(1), use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="only `generate` of a view keeps"):
        view(ids(1)[:, :1], past_key_values=cache)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    square = {"attention_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()}
    for call, match in ((packed, "rows are packed"), (square, r"mask \(\(1, 1, 7, 7\)\)")):
        with pytest.raises(ValueError, match=match):
            view(ids(1), **call)
    by_token = made("token", "llama").eval()
    close(logits(by_token, ids(1), **square), logits(by_token, ids(1)), 1e-6)
    close(logits(by_token, ids(1), **packed)[:, :3], logits(by_token, ids(1)[:, :3]), 1e-5)
