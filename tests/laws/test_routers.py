"""Routers: constant ones are numbers, others equal a second way of computing them."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coadapt import (
    Arrow,
    Fusion,
    Learned,
    LoraConfig,
    PeftModel,
    PooledRouter,
    Seq,
    Sum,
    TaskRouter,
    TokenRouter,
)
from coadapt.core.composition import trained_gates
from laws.routed import LORA, SERIAL, one_layer, routed, stirred
from laws.setting import (
    MAKE,
    close,
    far,
    gradients,
    ids,
    logits,
    loss,
    pairs,
    stir,
    view_on,
)

LAYERED = ["lora", "lora-all-linear", "bottleneck", "bottleneck-parallel", "bitfit", "ia3", "dora", "ln-tuning"]
EVERYWHERE = [*LAYERED, "prefix", "prefix-decoupled"]


def even(router: Any, *logits_of: float) -> Any:
    """The router as it would be if it had learned to choose by nothing but a bias."""
    with torch.no_grad():
        for site in router.sites.values():
            found = torch.tensor(logits_of)[: len(site.used)]
            network = site.network
            if isinstance(network, nn.Embedding):
                network.weight.copy_(found.expand_as(network.weight))
            else:
                network.weight.zero_()
                network.bias.copy_(found)
    return router


# ---- what is constant is a number ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["token", "pooled", "task", "sigmoid"])
@pairs(0, cases=EVERYWHERE)
def test_a_router_that_reads_nothing_is_its_numbers(case: str, model: str, kind: str) -> None:
    if kind == "pooled" and case == "ln-tuning" and model in ("gemma3", "qwen3"):
        pytest.skip("norms of queries and keys see heads, whose tokens cannot be told: refused in the call")
    routers: dict[str, Any] = {
        "token": TokenRouter(),
        "pooled": PooledRouter(temperature=2.0),
        "task": TaskRouter(3),
        "sigmoid": TokenRouter(activation="sigmoid"),
    }
    router = routers[kind]
    view = view_on(model, case, case, by=0.3)
    convolves = any(isinstance(p.place.module, nn.Conv1d | nn.Conv2d) for p in view.get_adapter("a").parts)
    if kind in ("token", "sigmoid") and convolves:
        with pytest.raises(ValueError, match="a convolution"):
            view.set_adapter(Sum("a", "b", weights=router))
        return
    view.set_adapter(Sum("a", "b", weights=router))
    scores = torch.tensor([0.7, -0.4])
    even(router, *scores.tolist())
    told = {"task_ids": [0, 2, 1]} if kind == "task" else {}
    numbers = scores.sigmoid() if kind == "sigmoid" else (scores / router.temperature).softmax(0)
    expected = logits(view, adapters=Sum("a", "b", weights=numbers.tolist()))
    close(logits(view, **told), expected, 1e-5)
    far(expected, logits(view, adapters="0.5*a + 0.5*b"))


@pytest.mark.parametrize("model", ["llama", "t5", "bert"])
def test_prompts_are_mixed_by_task_and_by_row(model: str) -> None:
    view = view_on(model, "prompt", "prompt", by=0.3)
    view.set_adapter(Sum("a", "b", weights=TaskRouter(2)))
    stirred(view)
    table = view.gates[0].sites[next(iter(view.gates[0].sites))].network.weight.detach()
    mixed = logits(view, task_ids=[0, 1, 1])
    for row, task in enumerate([0, 1, 1]):
        alone = Sum("a", "b", weights=table[task].softmax(0).tolist())
        close(mixed[row], logits(view, ids()[row : row + 1], adapters=alone)[0], 1e-5)
    far(mixed[0], mixed[1])


def test_an_encoders_prompts_are_mixed_by_what_the_row_says() -> None:
    """As ATTEMPT does (arXiv 2205.11961), with the mean of the row's tokens."""
    view = view_on("bert", "prompt", "prompt", by=0.3)
    view.set_adapter(Sum("a", "b", weights=PooledRouter()))
    stirred(view, by=3.0)
    tokens, mask = ids(2), torch.ones(2, ids(2).shape[1], dtype=torch.long)
    mask[1, 3:] = 0
    site = view.gates[0].sites["/input:bert"].network
    words = view.base.get_input_embeddings()(tokens)
    for row, length in enumerate([tokens.shape[1], 3]):
        numbers = site(words[row, :length].mean(0)).softmax(0).tolist()
        assert abs(numbers[0] - 0.5) > 1e-3
        expected = logits(view, tokens[row : row + 1, :length], adapters=Sum("a", "b", weights=numbers))
        close(logits(view, tokens, attention_mask=mask)[row], expected[0], 1e-5)


# ---- against a second way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configs", [(LORA, LORA, LORA), (LORA, SERIAL, LORA)])
@pytest.mark.parametrize("hidden", [None, 7])
def test_tokens_by_hand(configs: Any, hidden: int | None) -> None:
    view, x, y, changes = one_layer(*configs)
    router = TokenRouter(top_k=2, temperature=0.5, hidden=hidden)
    view.set_adapter(Sum("a", "b", "c", weights=router))
    stirred(view)
    expected = y.clone()
    scores = router.sites["/linear"].network(x).detach() / 0.5
    for b, t in itertools.product(range(3), range(4)):
        best = sorted(range(3), key=lambda i: -float(scores[b, t, i]))[:2]
        gates = F.softmax(scores[b, t, best], dim=0)
        for i, gate in zip(best, gates, strict=True):
            expected[b, t] += gate * changes[i][b, t]
    close(view(x), expected)


def test_pooled_by_hand() -> None:
    view, x, y, changes = one_layer(LORA, LORA)
    view.set_adapter(Sum("a", "b", weights=PooledRouter(activation="sigmoid")))
    stirred(view)
    gates = view.gates[0].sites["/linear"].network(x.mean(1)).sigmoid()
    close(view(x), y + sum(gates[:, i, None, None] * changes[i] for i in range(2)))


def test_arrow_by_hand() -> None:
    """Its prototypes by an SVD of B A itself; and they follow what the adapters have learned since."""
    view, x, y, changes = one_layer(LORA, LORA, LORA)
    view.set_adapter(Sum("a", "b", "c", weights=Arrow(top_k=2, temperature=0.3)))
    for _ in range(2):
        methods = [view.get_adapter(n).parts[0].method for n in "abc"]
        vectors = [torch.linalg.svd(m.merge(torch.zeros(5, 6))).Vh[0] for m in methods]
        scores = torch.stack([(x @ v).abs() for v in vectors], dim=-1) / 0.3
        kept = scores.topk(2, dim=-1)
        gates = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))
        close(view(x), y + sum(gates[..., i, None] * changes[i] for i in range(3)), 1e-5)
        stir(view.get_adapter("b"), seed=9, by=1.0)
        changes[1] = (view(x, adapters="b") - y).detach()
    assert not list(view.gates.parameters())


def test_arrow_reads_the_adapters_that_are_there() -> None:
    """Parameters whose memory is another one now (moved to a device and back), and other adapters of the same name."""
    view, x, _, _ = one_layer(LORA, LORA)
    view.set_adapter(Sum("a", "b", weights=Arrow()))
    node = view.composition
    view(x)
    for p in view.get_adapter("a").parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    close(view(x), view(x, adapters=Sum("a", "b", weights=Arrow())))
    view.set_adapter("b")
    view.delete_adapter("a")
    view.add_adapter("a", LORA)
    with pytest.raises(ValueError, match="made for other adapters"):
        view.set_adapter(node)
    copied = copy.deepcopy(view)
    copied.set_adapter(Sum("a", "b", weights=Arrow()))
    again = copy.deepcopy(copied)
    stir(again.get_adapter("a"), seed=3, by=1.0)
    close(again(x), again(x, adapters=Sum("a", "b", weights=Arrow())))


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("configs", [(LORA, LORA), (LORA, SERIAL), (SERIAL, SERIAL)])
def test_fusion_by_hand(configs: Any, values: bool) -> None:
    view, x, y, changes = one_layer(*configs)
    fusion = Fusion(dim=4, values=values, temperature=0.7)
    view.set_adapter(Sum("a", "b", weights=fusion))
    stirred(view)
    site: Any = fusion.sites["/linear"].network
    expected = y.clone()
    for b, t in itertools.product(range(3), range(4)):
        query = site.query(y[b, t])
        scores = torch.stack([query @ site.key(c[b, t]) for c in changes]) / 0.7
        mixed = sum(g * c[b, t] for g, c in zip(scores.softmax(0), changes, strict=True))
        expected[b, t] += site.value(mixed) if values else mixed
    close(view(x), expected, 1e-5)


@pytest.mark.parametrize("case", ["prefix", "prompt"])
def test_fusion_leaves_what_has_a_site_to_itself(case: str) -> None:
    """There is nothing to attend to there, so it takes part as it is."""
    view = routed("llama", Fusion(dim=4), "lora", case, "lora")
    with torch.no_grad():
        for name in "ac":
            for part in view.get_adapter(name).parts:
                part.method.B.zero_()
    close(logits(view), logits(view, adapters="b"), 1e-5)
    far(logits(view), logits(view.base))


def test_gates_multiply_down_a_tree() -> None:
    """A router in a Sum in a Seq, before a learned gate and a number: the changes of LoRAs just add up."""
    view, x, y, changes = one_layer(LORA, LORA, LORA)
    router = TokenRouter(activation="sigmoid")
    view.set_adapter(Sum(Seq(Sum("a", Sum("b", weights=[Learned(0.5)]), weights=router), "c"), weights=[2.0]))
    stirred(view.eval())
    gates = router.sites["/linear"].network(x).sigmoid()
    half = trained_gates(view.composition)[1]().detach()
    expected = y + 2 * (gates[..., :1] * changes[0] + half * gates[..., 1:] * changes[1] + changes[2])
    close(view(x), expected, 1e-5)


def test_per_layer_gates() -> None:
    view = view_on("llama", "lora", "bottleneck", by=0.3)
    gate = Learned(0.5, per_layer=True)
    view.set_adapter(Sum("a", "b", weights=[gate, 1.0]))
    close(logits(view), logits(view, adapters="0.5*a + b"))
    assert list(gate.values()) == ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        gate.log_gate.copy_(torch.tensor([0.3, 2.0]).log())
    scaled = logits(view)
    with torch.no_grad():
        for part in view.get_adapter("a").parts:
            part.method.B.mul_(0.3 if ".0." in part.place.path else 2.0)
    close(logits(view, adapters="a + b"), scaled, 1e-5)
    loss(view).backward()
    assert gradients(view)["gates.0.log_gate"].abs().min() > 0


def test_a_per_layer_gate_goes_on_before_fewer_layers(tmp_path: Any) -> None:
    """Where one of the adapters behind it was taken away: with the numbers that the layers left have, saved too."""
    view = PeftModel(MAKE["llama"](), LoraConfig(target_modules=["v_proj"], layers_to_transform=[1]), "a")
    view.add_adapter("b", LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    stirred(view)
    gate = Learned(per_layer=True)
    view.set_adapter(Sum(Seq("a", "b"), weights=[gate]))
    with torch.no_grad():
        gate.log_gate.copy_(torch.tensor([0.3, 2.0]).log())
    expected = logits(view, adapters="2*a")
    view.delete_adapter("b")
    close(logits(view), expected)
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MAKE["llama"](), tmp_path)
    close(logits(again), expected)
    assert trained_gates(again.composition)[0].values() == pytest.approx(gate.values())  # type: ignore[attr-defined]
