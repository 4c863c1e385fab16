"""Routers: constant ones are numbers, others equal a second way of computing them; no token knows of later ones."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import GenerationConfig

from coadapt import (
    Arrow,
    BottleneckConfig,
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
from coadapt.core.composition import trained_gates
from laws.setting import (
    MAKE,
    attach,
    close,
    far,
    gradients,
    ids,
    logits,
    loss,
    pairs,
    recompute,
    same_gradients,
    stir,
    view_on,
)
from laws.test_generation import writer, written

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


def stirred(view: PeftModel, by: float = 0.5) -> PeftModel:
    """Routers that do depend on what goes in."""
    stir(view.gates, seed=5, by=by)
    return view


def routed(model: str, router: Any, *cases: str, base: Any = None) -> PeftModel:
    view = attach(MAKE[model]() if base is None else base, model, *cases, by=0.3)
    view.set_adapter(Sum(*"abcd"[: len(cases)], weights=router))
    return stirred(view)


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


class OneLayer(nn.Module):
    """One linear layer, so that what a site reads is the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_layer(*configs: Any) -> tuple[PeftModel, Tensor, Tensor, list[Tensor]]:
    """A view, an input (B, T, I), what the base makes of it, and the change that each adapter makes."""
    view = PeftModel(OneLayer())
    for name, config in zip("abc", configs, strict=False):
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=ord(name), by=0.5)
    torch.manual_seed(1)
    x = torch.randn(3, 4, 6)
    y = view.base(x).detach()
    return view, x, y, [(view(x, adapters=n) - y).detach() for n in "abc"[: len(configs)]]


LORA = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
SERIAL = BottleneckConfig(bottleneck_size=3, target_modules=["linear"])


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


# ---- rows, tokens, time ----------------------------------------------------------------------------------------------

ROUTERS: dict[str, Any] = {
    "token": lambda: TokenRouter(),
    "top-1": lambda: TokenRouter(top_k=1),
    "pooled": lambda: PooledRouter(),
    "sigmoid": lambda: PooledRouter(activation="sigmoid"),
    "task": lambda: TaskRouter(2),
    "arrow": lambda: Arrow(),
    "fusion": lambda: Fusion(dim=4),
}
CASES = {
    "arrow": ("lora", "lora"),
    "fusion": ("lora-all-linear", "bottleneck"),
    "sigmoid": ("lora", "prefix", "bottleneck"),
}


def made(kind: str, model: str, base: Any = None) -> PeftModel:
    """A view with a router of this kind; UniPELT's over a LoRA, a prefix and a bottleneck."""
    cases = CASES.get(kind, ("lora", "bottleneck") if model == "bloom" else ("lora", "prefix", "lora"))
    if model == "bloom":
        cases = tuple("lora" if c == "prefix" else c for c in cases)
    return routed(model, ROUTERS[kind](), *cases, base=base)


def told(kind: str, tasks: list[int]) -> dict[str, Any]:
    return {"task_ids": tasks} if kind == "task" else {}


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


@pytest.mark.parametrize("kind", ["token", "task", "arrow"])
def test_a_static_cache(kind: str) -> None:
    view = routed("llama", ROUTERS[kind](), "lora", "lora", base=writer("llama")).eval()
    tokens = ids(2)
    how: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "max_new_tokens": 5}
    how |= told(kind, [0, 1])
    expected = view.generate(tokens, **how)
    assert torch.equal(view.generate(tokens, cache_implementation="static", **how), expected)
    assert not torch.equal(expected, view.base.generate(tokens, **{k: v for k, v in how.items() if k != "task_ids"}))
