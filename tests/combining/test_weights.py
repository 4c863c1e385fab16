"""Adapters that change weights, into one: against dense matrices, read off a base with the composition merged in."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn

from coadapt import (
    BitFitConfig,
    FullCopyConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    Seq,
    Sum,
)
from models import bert, conv, gpt2, llama, logits, mixtral, plain, stir, t5
from steps import traces

MODELS: dict[str, Any] = {"llama": llama, "gpt2": gpt2, "t5": t5, "plain": plain, "conv": conv, "mixtral": mixtral}
TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["q_proj", "v_proj"], ["v_proj", "down_proj", "embed_tokens", "lm_head"]),
    "gpt2": (["c_attn", "wte"], ["c_attn", "c_proj", "wpe"]),
    "t5": (["q", "v"], ["q", "wi", "lm_head"]),
    "plain": (["first", "conv"], ["conv", "embed", "head"]),
    "conv": (["first", "second"], ["second", "hidden"]),
    "mixtral": (["q_proj"], ["v_proj", "q_proj"]),
}


def view_of(model: str, **first: Any) -> PeftModel:
    """Two LoRAs, a and b, of other ranks, scales and targets."""
    view = PeftModel(MODELS[model]())
    one, two = TARGETS[model]
    experts: dict[str, Any] = {}
    if model == "mixtral":
        experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]}
    view.add_adapter("a", LoraConfig(r=3, lora_alpha=7, target_modules=one, init_seed=1, **experts, **first))
    pattern: dict[str, Any] = {"rank_pattern": {two[0]: 2}, "alpha_pattern": {two[-1]: 5}}
    if model == "mixtral":
        experts = {"target_parameters": ["experts.down_proj"]}
    view.add_adapter("b", LoraConfig(r=4, use_rslora=True, target_modules=two, init_seed=2, **experts, **pattern))
    stir(view.get_adapter("a"), seed=1)
    stir(view.get_adapter("b"), seed=2)
    return view


def weights(base: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in base.named_parameters(remove_duplicate=False)}


def changes(view: PeftModel, node: Any) -> dict[str, Tensor]:
    """W' - W of every parameter, by merging."""
    before = weights(view.base)
    view.merge_adapter(node)
    after = weights(view.base)
    view.unmerge_adapter()
    found = {n: after[n] - before.get(n, torch.zeros_like(after[n])) for n in after}
    return {n: change for n, change in found.items() if change.abs().max() > 0}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = 1e-6) -> None:
    assert expected
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=0, atol=within, msg=lambda m, n=name: f"{n}: {m}")


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


COMPOSITIONS = ["a", "0.5*a + 0.5*b", "a - b", "-1*a", "a >> 0.3*b", "2*(a + 0.1*b) - 3*a"]


# ---- what is exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("node", ["a - 0.7*b", *(pytest.param(n, marks=pytest.mark.full) for n in COMPOSITIONS)])
def test_cat_is_the_composition(model: str, node: str) -> None:
    view = view_of(model)
    report = view.combine(node, adapter_name="c")
    assert report.exact
    assert {row.how for row in report.rows} == {"cat"}
    expected = logits(view, adapters=node)
    assert off(expected, logits(view.base)) > 1e-3
    assert off(logits(view, adapters="c"), expected) < 1e-5
    same(changes(view, "c"), changes(view, node))


@pytest.mark.parametrize("node", COMPOSITIONS)
def test_every_form_of_composition(node: str) -> None:
    view = view_of("plain")
    assert view.combine(node, "cat", adapter_name="cat").exact
    assert view.combine(node, "svd", adapter_name="svd", r="full").exact
    expected = changes(view, node)
    same(changes(view, "cat"), expected)
    same(changes(view, "svd"), expected)


numbers = some.floats(-2, 2).filter(lambda w: abs(w) > 0.05)


@settings(max_examples=8, deadline=None)
@given(weight=some.tuples(numbers, numbers), r=some.integers(1, 9))
def test_svd_is_the_best_of_its_rank(weight: tuple[float, float], r: int) -> None:
    view = view_of("plain")
    node = Sum("a", "b", weights=weight)
    report = view.combine(node, "svd", adapter_name="c", r=r)
    expected, found = changes(view, node), changes(view, "c")
    assert len(report.rows) == len(expected)
    for row in report.rows:
        whole = expected[f"{row.path}.weight"].flatten(1)
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :r] * s[:r]) @ v[:r]
        torch.testing.assert_close(found[f"{row.path}.weight"].flatten(1), best, rtol=0, atol=2e-6)
        assert row.lost == pytest.approx(float((best - whole).norm() / whole.norm()), abs=1e-5)
        assert row.apart == row.lost
        assert row.norm == pytest.approx(float(whole.norm()), rel=1e-4)
        assert row.rank is not None
        assert row.rank <= r


def test_the_same_twice_needs_no_more_rank() -> None:
    view = view_of("llama")
    view.combine("a + a", "cat", adapter_name="cat")
    view.combine("a + a", "svd", adapter_name="svd", r="full")
    assert (view.peft_config["cat"].r, view.peft_config["svd"].r) == (6, 3)  # type: ignore[attr-defined]
    assert off(logits(view, adapters="svd"), logits(view, adapters="2*a")) < 1e-5


def test_a_difference_of_equals_is_nothing() -> None:
    view = view_of("plain")
    for how, options in (("cat", {}), ("svd", {"r": "full"})):
        assert view.combine("a - a", how, adapter_name=how, **options).exact
        assert off(logits(view, adapters=how), logits(view.base)) < 1e-6


def test_probe_15_the_fields_linear_is_far_off_and_says_so() -> None:
    """a - b by factors apart: the cross terms are as large as the change itself."""
    view = PeftModel(llama())
    for name in "ab":
        view.add_adapter(name, LoraConfig(r=4, init_lora_weights=False))
        stir(view.get_adapter(name), seed=ord(name))
    report = view.combine("a - b", "ab_linear", adapter_name="c")
    assert report.lost is not None
    assert report.lost > 0.5
    expected, found = changes(view, "a - b"), changes(view, "c")
    for row in report.rows:
        whole = expected[f"{row.path}.weight"]
        assert row.apart == pytest.approx(float((found[f"{row.path}.weight"] - whole).norm() / whole.norm()), rel=1e-3)
    assert view.combine("a - b", adapter_name="d").exact


# ---- other methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", "plain"])
def test_any_methods_through_their_changes(model: str) -> None:
    view = view_of(model)
    view.add_adapter("d", LoraConfig(r=2, use_dora=True, target_modules=TARGETS[model][0]))
    view.add_adapter("i", IA3Config(target_modules=["first", "second"] if model == "plain" else None))
    stir(view.get_adapter("d"), seed=3)
    stir(view.get_adapter("i"), seed=4)
    node = "0.5*a + d - 0.3*(i >> a)"
    with pytest.raises(ValueError, match=r"not of low rank \(.*has no factors\).*There are: cat, svd"):
        view.combine(node, adapter_name="c")
    with pytest.raises(ValueError, match="has no factors to put side by side"):
        view.combine(node, "cat", adapter_name="c")
    report = view.combine(node, "svd", adapter_name="c", r="full")
    assert report.exact
    assert off(logits(view, adapters="c"), logits(view, adapters=node)) < 1e-5
    same(changes(view, "c"), changes(view, node), within=2e-6)
    cut = view.combine(node, "svd", adapter_name="cut", r=4)
    assert max(row.rank or 0 for row in cut.rows) == 4
    assert cut.lost is not None
    assert 0 < cut.lost < 1


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_are_combined_exactly(bias: str) -> None:
    view = view_of("gpt2", bias=bias)
    view.add_adapter("f", BitFitConfig(target_modules=["mlp.c_proj", "ln_f"] if bias == "all" else ["c_attn"]))
    stir(view.get_adapter("f"), seed=3)
    report = view.combine("0.5*a - 2*f + b", adapter_name="c")
    assert report.exact
    assert "exactly" in str(report)
    assert view.peft_config["c"].bias == ("all" if bias == "all" else "lora_only")  # type: ignore[attr-defined]
    same(changes(view, "c"), changes(view, "0.5*a - 2*f + b"))


def test_biases_alone_and_norms_alone() -> None:
    view = view_of("plain")
    for i, name in enumerate(("f", "g")):
        view.add_adapter(name, BitFitConfig(target_modules=["first", "norm"]))
        stir(view.get_adapter(name), seed=i)
    for i, name in enumerate(("m", "n")):
        view.add_adapter(name, LNTuningConfig())
        stir(view.get_adapter(name), seed=i)
    for node, new in (("f - 0.5*g", "biases"), ("m - 0.5*n", "norms"), ("m + g", "both")):
        if new == "both":
            with pytest.raises(ValueError, match="cannot hold the change of a norm's weight"):
                view.combine(node, adapter_name=new)
            continue
        assert view.combine(node, adapter_name=new).exact
        same(changes(view, new), changes(view, node))
        with pytest.raises(ValueError, match="No weight matrix is changed"):
            view.combine(node, "svd", adapter_name="other", r=2)
    view.combine("f + g", "mean", adapter_name="mean")
    same(changes(view, "mean"), changes(view, "0.5*f + 0.5*g"))


def test_a_bias_where_there_is_none_is_refused() -> None:
    view = view_of("llama")
    view.add_adapter("f", BitFitConfig(target_modules=["k_proj"]))
    stir(view.get_adapter("f"))
    with pytest.raises(ValueError, match=r"give a bias to .*k_proj.*which has none"):
        view.combine("a + f", adapter_name="c")
    assert view.combine("2*f", adapter_name="c").exact
    assert off(logits(view, adapters="c"), logits(view, adapters="2*f")) < 1e-5


def test_copies_of_layers_are_summed_exactly() -> None:
    view = PeftModel(plain())
    saved: dict[str, Any] = {"target_modules": ["first"], "modules_to_save": ["head", "norm"]}
    view.add_adapter("a", LoraConfig(r=2, **saved))
    view.add_adapter("b", LoraConfig(r=3, **saved))
    view.add_adapter("f", FullCopyConfig(target_modules=["second", "head"]))
    for i, name in enumerate("abf"):
        stir(view.get_adapter(name), seed=i)
    for i, node in enumerate(("0.5*a - 2*b", "a >> b", "2*f", "a + f", "a >> 0.5*(b >> f)")):
        assert view.combine(node, adapter_name=f"c{i}").exact
        assert off(logits(view, adapters=f"c{i}"), logits(view, adapters=node)) < 1e-5
    view.combine("a + b", "mean", adapter_name="mean")
    assert off(logits(view, adapters="mean"), logits(view, adapters="0.5*a + 0.5*b")) < 1e-5
    view.combine("a", "svd", adapter_name="small", r=1)
    assert torch.equal(_head(view, "small"), _head(view, "a"))
    view.add_adapter("h", LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(ValueError, match="'head' is a trained copy in 'a', and 'h' adapts 'head' too"):
        view.combine("a + h", adapter_name="no")


def _head(view: PeftModel, name: str) -> Tensor:
    return next(p.method.copy.weight for p in view.get_adapter(name).parts if p.place.path == "head")  # type: ignore


def test_copies_of_other_modules_only_by_themselves() -> None:
    view = PeftModel(gpt2())
    for name in "ab":
        view.add_adapter(name, LoraConfig(r=2, modules_to_save=["h.1.mlp"]))
        stir(view.get_adapter(name), seed=ord(name))
    view.add_adapter("c", LoraConfig(r=2))
    stir(view.get_adapter("c"))
    assert view.combine("a + 0.5*c", adapter_name="d").exact
    assert off(logits(view, adapters="d"), logits(view, adapters="a + 0.5*c")) < 1e-5
    for node in ("a + b", "0.5*a"):
        with pytest.raises(ValueError, match=r"a trained copy of 'transformer.h.1.mlp' \(GPT2MLP\).*weighs or sums"):
            view.combine(node, adapter_name="no")


def test_a_classifier_and_its_head(tmp_path: Any) -> None:
    for config in (LoraConfig(r=2, task_type="SEQ_CLS"), PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")):
        view = PeftModel(bert())
        for name in "ab":
            view.add_adapter(name, config)
            stir(view.get_adapter(name), seed=ord(name))
        view.combine("0.3*a + 0.7*b", adapter_name="c")
        expected = logits(view, adapters="0.3*a + 0.7*b")
        assert off(logits(view, adapters="c"), expected) < 1e-5
        view.set_adapter("c")
        view.save_pretrained(tmp_path / config.method, selected_adapters=["c"])
        assert off(logits(PeftModel.from_pretrained(bert(), tmp_path / config.method)), expected) < 1e-5


# ---- votes: TIES, DARE, pruning --------------------------------------------------------------------------------------


def naive_trim(values: list[float], density: float) -> list[float]:
    kept = sorted(range(len(values)), key=lambda i: -abs(values[i]))[: max(1, int(density * len(values)))]
    return [v if i in kept else 0.0 for i, v in enumerate(values)]


def naive_ties(columns: list[list[float]], frequency: bool) -> list[float]:
    out: list[float] = []
    for values in zip(*columns, strict=True):
        votes = [(v > 0) - (v < 0) for v in values] if frequency else values
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [v for v in values if v * sign > 0]
        out.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return out


@pytest.mark.parametrize("how", ["ties", "ties-frequency", "magnitude_prune"])
def test_votes_number_by_number(how: str) -> None:
    view = view_of("plain")
    for i, name in enumerate(("c", "d")):
        view.add_adapter(name, LoraConfig(r=2, target_modules=["first", "conv"], init_lora_weights=False))
        stir(view.get_adapter(name), seed=10 + i)
    weighted = {"a": 1.0, "c": 0.5, "d": -2.0}
    options: dict[str, Any] = {"majority_sign": "frequency"} if how == "ties-frequency" else {}
    node = Sum(*weighted, weights=list(weighted.values()))
    report = view.combine(node, how.partition("-")[0], adapter_name="new", r="full", density=0.3, **options)
    found, true = changes(view, "new"), changes(view, node)
    alone = {name: changes(view, name) for name in weighted}
    for row in report.rows:
        key = f"{row.path}.weight"
        columns = [naive_trim((w * alone[n][key]).flatten().tolist(), 0.3) for n, w in weighted.items()]
        if how == "magnitude_prune":
            expected = [sum(values) for values in zip(*columns, strict=True)]
        else:
            expected = naive_ties(columns, frequency=how == "ties-frequency")
        made = torch.tensor(expected, dtype=torch.float64).view(true[key].shape)
        torch.testing.assert_close(found[key], made, rtol=0, atol=2e-6)
        assert row.apart == pytest.approx(float((made - true[key]).norm() / true[key].norm()), rel=1e-3)
        assert row.lost is not None
        assert row.lost < 1e-5


def test_dare_keeps_a_share_and_rescales_it() -> None:
    view = view_of("llama")
    view.combine("a", "dare_linear", adapter_name="one", r="full", density=0.25, seed=3)
    view.combine("a", "dare_linear", adapter_name="two", r="full", density=0.25, seed=3)
    view.combine("a", "dare_linear", adapter_name="three", r="full", density=0.25, seed=4)
    true, one, two, three = (changes(view, n) for n in ("a", "one", "two", "three"))
    same(one, two)
    shares: list[float] = []
    for key, change in true.items():
        kept = one[key].abs() > 1e-6
        torch.testing.assert_close(one[key], torch.where(kept, change * 4, 0), rtol=0, atol=2e-6)
        shares.append(float(kept.double().mean()))
        assert off(one[key], three[key]) > 1e-3
    assert 0.2 < sum(shares) / len(shares) < 0.3


@pytest.mark.parametrize("how", ["dare_linear", "magnitude_prune"])
def test_a_density_of_one_changes_nothing(how: str) -> None:
    view = view_of("plain")
    assert view.combine("a - b", how, adapter_name="new", r="full", density=1).exact
    same(changes(view, "new"), changes(view, "a - b"))


def test_dare_ties_elects_among_what_is_kept() -> None:
    view = view_of("plain")
    view.combine("a + b", "dare_ties", adapter_name="dare", r="full", density=1.0)
    view.combine("a + b", "ties", adapter_name="ties", r="full", density=1.0)
    same(changes(view, "dare"), changes(view, "ties"))


def test_means_of_equals_do_not_shrink() -> None:
    """TRAPS 2: mean(stack * w) with normalised weights is smaller by the number of members."""
    view = view_of("plain")
    expected = changes(view, "a")
    for i, node in enumerate((["a", "a"], "0.5*a + 0.5*a", "3*a", "a + 2*a")):
        assert view.combine(node, "mean", adapter_name=f"mean{i}").exact
        same(changes(view, f"mean{i}"), expected)
    view.combine("a + b", "mean", adapter_name="both", r="full")
    same(changes(view, "both"), changes(view, "0.5*a + 0.5*b"))


def test_votes_with_experts_and_biases() -> None:
    view = view_of("mixtral")
    report = view.combine("a + b", "ties", adapter_name="c", r=5, density=0.5)
    assert {row.rank for row in report.rows} <= {4, 5}
    assert report.lost is not None
    assert 0 < report.lost < 1
    view = view_of("gpt2", bias="lora_only")
    report = view.combine("a", "magnitude_prune", adapter_name="c", r="full", density=0.5)
    biases = [row for row in report.rows if row.path.endswith(".bias")]
    assert biases
    change, cut = changes(view, "a"), changes(view, "c")
    for row in biases:
        assert int((cut[row.path].abs() > 1e-7).sum()) == change[row.path].numel() // 2


# ---- the view --------------------------------------------------------------------------------------------------------


def test_nothing_else_changes() -> None:
    view = view_of("llama")
    view.set_adapter("a + 0.5*b")
    view.freeze("b")
    view.train()
    before = view.state_dict()
    base = traces(view.base)
    random = torch.get_rng_state()
    expected = logits(view)
    report = view.combine(view.composition, adapter_name="c")
    assert torch.equal(torch.get_rng_state(), random)
    assert view.trainable() == ["a"]
    assert view.active_adapters == ["a", "b"]
    assert torch.equal(logits(view), expected)
    after = view.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k != "_extra_state")
    assert report.adapter_name == "c"
    assert all(not p.requires_grad for p in view.get_adapter("c").parameters())
    view.unfreeze("c")
    logits(view, adapters="c").sum().backward()
    assert all(p.grad is not None for p in view.get_adapter("c").parameters())
    view.zero_grad()
    view.delete_adapter("c")
    assert traces(view.base) == base


def test_a_failure_leaves_no_trace() -> None:
    view = view_of("llama")
    before, names = traces(view.base), sorted(view.state_dict())
    with pytest.raises(ValueError):
        view.combine("a + b", "ab_linear", adapter_name="c")
    assert (traces(view.base), sorted(view.state_dict())) == (before, names)


def test_saved_and_loaded(tmp_path: Any) -> None:
    for model in ("llama", "mixtral", "plain"):
        view = view_of(model)
        view.combine("a - 0.5*b", adapter_name="c")
        expected = logits(view, adapters="c")
        view.save_pretrained(tmp_path / model, selected_adapters=["c"])
        again = PeftModel.from_pretrained(MODELS[model](), tmp_path / model)
        assert off(logits(again, adapters="c"), expected) < 1e-6


def test_names_that_are_ends_of_each_other() -> None:
    """rank_pattern and targets match ends of names: "first" is also the end of "inner.first"."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.inner = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["second"](torch.tanh(self.inner["first"](torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    view = PeftModel(Outer())
    view.add_adapter("a", LoraConfig(r=2, target_modules=r"first", init_lora_weights=False))
    view.add_adapter("b", LoraConfig(r=3, target_modules=["first", "second"], init_lora_weights=False))
    stir(view.adapters)
    view.combine("a - b", adapter_name="c")
    x = torch.randn(2, 6)
    assert off(view(x, adapters="c"), view(x, adapters="a - b")) < 1e-6
    view.combine("2*a", adapter_name="d")
    assert off(view(x, adapters="d"), view(x, adapters="2*a")) < 1e-6
    assert [p.place.path for p in view.get_adapter("d").parts] == ["first"]


def test_half_precision_bases_and_gates() -> None:
    view = PeftModel(llama().to(torch.bfloat16))
    view.add_adapter("d", LoraConfig(r=2, use_dora=True))
    view.add_adapter("a", LoraConfig(r=2))
    stir(view.adapters)
    assert view.combine("a", adapter_name="c").exact
    view.combine("d", "svd", adapter_name="e", r="full")
    same(changes(view, "e"), changes(view, "d"), within=1e-2)
    assert view.combine(Seq("a", "0.5*a"), adapter_name="f").exact


def test_a_base_without_values() -> None:
    with torch.device("meta"):
        base = plain()
    view = PeftModel(base)
    view.add_adapter("a", LoraConfig(r=2, target_modules=["first"]))
    view.add_adapter("i", IA3Config(target_modules=["first"]))
    for name, how, options in (("a", "cat", {}), ("i", "svd", {"r": 2})):
        with pytest.raises(ValueError, match="'first' has no values here"):
            view.combine(name, how, adapter_name="c", **options)


def test_the_report_prints_what_is_worth_a_line() -> None:
    view = view_of("plain")
    text = str(view.combine("a - b", "svd", adapter_name="c", r=1))
    assert text.splitlines()[1].split() == ["site", "how", "rank", "lost", "from", "the", "sum"]
    assert sorted(line.split()[0] for line in text.splitlines()[2:]) == ["conv", "embed", "first", "head"]
    view = PeftModel(llama(num_hidden_layers=4), LoraConfig(r=3, target_modules="all-linear"))
    stir(view.adapters)
    assert "Nothing is lost at any site" in str(view.combine("default", adapter_name="copy"))
    text = str(view.combine("default", "svd", adapter_name="cut", r=1))
    assert "The 5 of 28 sites that are furthest off." in text
    assert len(text.splitlines()) == 8
