"""Prompts, prefixes and bottlenecks into one: what is exact is exact, what is a mean is that of the numbers."""

from typing import Any

import pytest
import torch

from coadapt import (
    BottleneckConfig,
    Learned,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    Sum,
)
from models import bert, gpt2, ids, llama, logits, stir, t5

MODELS: dict[str, Any] = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert}


def view_of(model: str, **configs: Any) -> PeftModel:
    view = PeftModel(MODELS[model]())
    for i, (name, config) in enumerate(configs.items()):
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=i, by=0.5)
    return view


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


def prompt(n: int, **options: Any) -> PromptTuningConfig:
    return PromptTuningConfig(num_virtual_tokens=n, **options)


def prefix(n: int, **options: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=n, **options)


@pytest.mark.parametrize("model", MODELS)
def test_two_prompts_one_after_another(model: str) -> None:
    lstm = PromptEncoderConfig(num_virtual_tokens=2, encoder_reparameterization_type="LSTM", encoder_dropout=0.5)
    view = view_of(model, p=prompt(3), q=lstm).train()
    view.eval()
    expected = logits(view, adapters="p >> q")
    view.train()
    report = view.combine("p >> q", adapter_name="c")
    view.eval()
    assert report.exact
    assert [row.how for row in report.rows] == ["cat"]
    assert view.peft_config["c"].num_virtual_tokens == 5  # type: ignore[attr-defined]
    assert off(logits(view, adapters="c"), expected) < 1e-5
    assert off(logits(view, adapters="p"), expected) > 1e-4
    view.combine(["q", "p"], "cat", adapter_name="d")
    assert off(logits(view, adapters="d"), logits(view, adapters="q >> p")) < 1e-5


def test_prompts_added_and_nested() -> None:
    view = view_of("llama", p=prompt(3), q=prompt(3), r=prompt(2))
    for i, node in enumerate(("0.5*p - 2*q", "r >> (p + 0.5*q)", "p + q")):
        assert view.combine(node, adapter_name=f"c{i}").exact
        assert off(logits(view, adapters=f"c{i}"), logits(view, adapters=node)) < 1e-5
    view.combine("p + q", "mean", adapter_name="mean")
    assert off(logits(view, adapters="mean"), logits(view, adapters="0.5*p + 0.5*q")) < 1e-5
    with pytest.raises(ValueError, match=r"\[2, 3\] tokens.*how='cat'"):
        view.combine("p + r", adapter_name="no")
    with pytest.raises(ValueError, match=r"here is 0.5\*q.*how='linear'"):
        view.combine("p >> 0.5*q", "cat", adapter_name="no")


def test_a_prompt_on_both_sides_of_an_encoder_decoder() -> None:
    both = {"prompt_sites": ["encoder", "decoder"]}
    view = view_of("t5", p=prompt(3, **both), q=prompt(2, **both), e=prompt(2))
    view.combine("p >> q", adapter_name="c")
    assert off(logits(view, adapters="c"), logits(view, adapters="p >> q")) < 1e-5
    with pytest.raises(ValueError, match="'p' and 'e' differ in prompt_sites"):
        view.combine("p >> e", adapter_name="no")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("node", ["p >> q", "q + p", ["p", "q", "p"]])
def test_m3_5_two_prefixes_in_one(model: str, node: Any) -> None:
    view = view_of(model, p=prefix(3, prefix_projection=True, encoder_hidden_size=8), q=prefix(2))
    assert off(logits(view, adapters=node), logits(view, adapters="p")) > 1e-3
    for how in (None, "cat"):
        report = view.combine(node, how, adapter_name=f"c{how}")
        assert report.exact
        assert off(logits(view, adapters=f"c{how}"), logits(view, adapters=node)) < 1e-5


@pytest.mark.parametrize("offsets", [(0, 0), (0, None), (5, 1)])
def test_positions_shift_by_the_sum(offsets: tuple[Any, Any], tmp_path: Any) -> None:
    view = view_of("gpt2", p=prefix(3, position_offset=offsets[0]), q=prefix(2, position_offset=offsets[1]))
    report = view.combine("p >> q", adapter_name="c")
    shift = sum(n if o is None else o for n, o in zip((3, 2), offsets, strict=True))
    assert f"positions are shifted by {shift}" in str(report)
    expected = logits(view, adapters="p >> q")
    assert off(logits(view, adapters="c"), expected) < 1e-5
    view.set_adapter("c")
    view.save_pretrained(tmp_path, selected_adapters=["c"])
    assert off(logits(PeftModel.from_pretrained(gpt2(), tmp_path)), expected) < 1e-5


def test_cached_generation_from_one_prefix_of_two() -> None:
    view = view_of("llama", p=prefix(3), q=prefix(2))
    view.combine("p >> q", adapter_name="c")
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    one = view.generate(ids(), adapters="c", **options)
    assert torch.equal(one, view.generate(ids(), adapters="p >> q", **options))
    assert torch.equal(one, view.generate(ids(), adapters="c", use_cache=False, **options))


def test_the_mean_of_prefixes() -> None:
    view = view_of("llama", p=prefix(3), q=prefix(3), short=prefix(2), moved=prefix(3, position_offset=0))
    report = view.combine("p + 3*q", "mean", adapter_name="c")
    assert not report.exact
    assert report.lost is None
    assert "error unknown" in str(report)
    expected = 0.25 * view.get_adapter("p").weight + 0.75 * view.get_adapter("q").weight
    torch.testing.assert_close(view.get_adapter("c").weight, expected)
    view.combine("p", "mean", adapter_name="d")
    assert off(logits(view, adapters="d"), logits(view, adapters="p")) < 1e-5
    for other, what in (("short", "num_virtual_tokens"), ("moved", "position_offset")):
        with pytest.raises(ValueError, match=f"'p' and '{other}' differ in {what}"):
            view.combine(f"p + {other}", "mean", adapter_name="no")


def test_prefixes_that_are_no_one_prefix() -> None:
    view = view_of("t5", p=prefix(3), d=prefix(3, prefix_type="decoupled"), f=prefix(3, prefix_layout="peft"),
                   e=prefix(3, prefix_sites=["encoder"]))  # fmt: skip
    wrong = {
        "p + d": "'d' is a decoupled prefix",
        "p + f": "'f' has the field's layout",
        "p + e": "'p' and 'e' differ in prefix_sites",
        "0.5*p": r"all weights are 1, and here is 0.5\*p. A gate on a prefix is a bias",
    }
    for node, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            view.combine(node, adapter_name="no")
    assert list(view.peft_config) == ["p", "d", "f", "e"]


def test_the_mean_of_bottlenecks() -> None:
    one = BottleneckConfig(bottleneck_size=4, scaling="learned")
    view = view_of("llama", a=one, b=one, wide=BottleneckConfig(bottleneck_size=5, scaling="learned"))
    view.combine("a + 3*b", "mean", adapter_name="c")
    expected = 0.25 * view.get_adapter("a").weight + 0.75 * view.get_adapter("b").weight
    torch.testing.assert_close(view.get_adapter("c").weight, expected)
    assert view.combine("a", "mean", adapter_name="d").exact
    with pytest.raises(ValueError, match=r"No Bottleneck is equal to several others\. how='mean'"):
        view.combine("a + b", adapter_name="no")
    with pytest.raises(ValueError, match="'a' and 'wide' differ in the configuration"):
        view.combine("a + wide", "mean", adapter_name="no")
    with pytest.raises(ValueError, match="not a Seq"):
        view.combine("a >> b", "mean", adapter_name="no")


def test_kinds_do_not_mix() -> None:
    view = view_of("llama", p=prompt(3), x=prefix(2), a=LoraConfig(r=2), h=LoraConfig(modules_to_save=["lm_head"]))
    with pytest.raises(TypeError, match=r"'a' is of weights, 'p' is of prompts"):
        view.combine("a + p", adapter_name="no")
    with pytest.raises(TypeError, match="'x' is of prefixes"):
        view.combine("a + x", adapter_name="no")
    for node, how in (("p", "svd"), ("x", "ties")):
        with pytest.raises(ValueError, match="combines changes of weights; for pr"):
            view.combine(node, how, adapter_name="no", r=2, **({"density": 0.5} if how == "ties" else {}))
    with pytest.raises(ValueError, match="have no rank"):
        view.combine("p", "linear", adapter_name="no", r=2)


def test_wrong_calls() -> None:
    view = view_of("llama", a=LoraConfig(r=2), b=LoraConfig(r=3))
    wrong: list[tuple[Any, str | None, dict[str, Any], str]] = [
        ("a + c", None, {}, "There is no adapter 'c'"),
        ("0*a", None, {}, "names no adapter"),
        ("a", "sdv", {"r": 2}, "no way to combine called 'sdv'. Did you mean 'svd'"),
        ("a", None, {"r": 2}, "r has no effect with how=None"),
        ("a", "cat", {"r": 2}, "r has no effect with how='cat'"),
        ("a", "svd", {"r": 2, "density": 0.5}, "density has no effect"),
        ("a", "ties", {"r": 2, "density": 0.5, "seed": 1}, "seed has no effect"),
        ("a", "svd", {}, "how='svd' needs r="),
        ("a", "ties", {"r": 2}, "how='ties' needs density="),
        ("a", "ties", {"density": 0.5}, "gives changes of full rank; say r="),
        ("a", "svd", {"r": 0}, "r=0 must be"),
        ("a", "svd", {"r": "half"}, "r='half' must be"),
        ("a", "svd", {"r": 1.5}, "r=1.5 must be"),
        ("a", "ties", {"r": 2, "density": 0}, "density=0"),
        ("a", "ties", {"r": 2, "density": 1.5}, "density=1.5"),
        ("a", "ties", {"r": 2, "density": 0.5, "majority_sign": "most"}, "majority_sign='most'"),
        ("a - b", "mean", {}, "divides by the sum of the weights"),
        ("a + b", "ab_linear", {}, r"the ranks are \[2, 3\]"),
        (Sum("a", weights=[torch.ones(3)]), None, {}, "gate per row"),
    ]
    for node, how, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            view.combine(node, how, adapter_name="no", **options)
    for name, message in (("a", "There is an adapter 'a' already"), ("x/y", "cannot name an adapter")):
        with pytest.raises(ValueError, match=message):
            view.combine("a + b", adapter_name=name)
    view.merge_adapter("a")
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        view.combine("a + b", adapter_name="no")
    other = PeftModel(view.base, LoraConfig(r=2), adapter_name="a")
    with pytest.raises(RuntimeError, match="Another view"):
        other.combine("a", adapter_name="no")
    view.unmerge_adapter()
    assert sorted(view.peft_config) == ["a", "b"]


def test_learned_gates_are_taken_as_they_are() -> None:
    view = view_of("llama", a=LoraConfig(r=2), b=LoraConfig(r=3))
    node = Sum("a", "b", weights=[Learned(0.3), 1.0])
    assert view.combine(node, adapter_name="c").exact
    assert off(logits(view, adapters="c"), logits(view, adapters="0.3*a + b")) < 1e-5
