"""Merging writes what the adapters do into the weights; unmerging puts the weights back to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from coadapt import LoraConfig, PeftModel, Sum
from laws.setting import EVERY, MAKE, WITHOUT_BIAS, attach, close, far, ids, logits, pairs, stir, view_on

MERGED = ["lora", "lora-all-linear", "lora-bias", "bitfit"]


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in now.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pairs(1, cases=MERGED)
def test_merge_equals_adapted_and_unmerge_is_exact(case: str, model: str, dtype: torch.dtype) -> None:
    base = MAKE[model]().to(dtype)
    before, identities = snapshot(base), {n: id(p) for n, p in base.named_parameters()}
    view = attach(base, model, case, "lora")
    for node in ("a", "a + 0.5*b", "a >> b", "-2*b"):
        view.set_adapter(node)
        adapted = logits(view)
        view.merge_adapter()
        merged = logits(base)
        assert torch.equal(logits(view), merged)
        close(merged.float(), adapted.float(), 1e-5 if dtype == torch.float32 else 5e-2)
        far(merged, logits_of(before, model, dtype))
        view.unmerge_adapter()
        assert_same(base, before)
        assert torch.equal(logits(view), adapted)
    assert {n: id(p) for n, p in base.named_parameters()} == identities


def logits_of(weights: dict[str, torch.Tensor], model: str, dtype: torch.dtype) -> torch.Tensor:
    fresh = MAKE[model]().to(dtype)
    fresh.load_state_dict(weights)
    return logits(fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layer", [nn.Linear(24, 16), Conv1D(16, 24), nn.Embedding(30, 16), nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3, groups=2)]
)
def test_what_is_merged_is_rounded_once(layer: nn.Module, dtype: torch.dtype) -> None:
    """Weights in half precision are as near to W + sum of g s B A, worked out in float64, as half precision can be."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": layer}).to(dtype)
    stored: Any = base["layer"].weight
    old, view = stored.detach().double(), PeftModel(base)
    for name, alpha in (("a", 4), ("b", 3)):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["layer"], init_lora_weights=False)
        view.add_adapter(name, config)
    stir(view.adapters, by=0.3)
    expected = old.mT.clone() if isinstance(layer, Conv1D | nn.Embedding) else old.clone()
    for name, factor in (("a", 2.0), ("b", 0.5 * 1.5)):
        p = {n[-1]: v.detach().double() for n, v in view.get_adapter(name).named_parameters()}
        expected += factor * (p["B"] @ p["A"].flatten(1)).view(expected.shape)
    expected = expected.mT if isinstance(layer, Conv1D | nn.Embedding) else expected
    view.set_adapter("a + 0.5*b")
    view.merge_adapter()
    merged: Any = base["layer"].weight
    assert merged.dtype == dtype
    assert merged.is_contiguous()
    half_a_step = 0.5 * torch.finfo(dtype).eps * expected.abs()
    assert bool(((merged.double() - expected).abs() <= 1.01 * half_a_step + 1e-6 * expected.abs().max()).all())


@pytest.mark.filterwarnings("ignore:.*layers that had no bias")
@pairs(2, cases=MERGED)
def test_merge_and_unload_equals_adapted_also_after_reload(case: str, model: str, tmp_path: Path) -> None:
    base: Any = MAKE[model]()
    classes = {n: type(m) for n, m in base.named_modules()}
    view = attach(base, model, case, "lora")
    adapted = logits(view)
    merged: Any = view.merge_and_unload()
    assert merged is base
    assert {n: type(m) for n, m in base.named_modules()} == classes
    close(logits(merged), adapted, 1e-5)
    if hasattr(merged, "save_pretrained") and not (case == "bitfit" and model in WITHOUT_BIAS):
        merged.save_pretrained(tmp_path)
        close(logits(type(base).from_pretrained(tmp_path).eval().requires_grad_(False)), adapted, 1e-5)


@pytest.mark.parametrize(
    ("model", "embedding", "head"),
    [
        ("gpt2", "wte", None),
        ("gpt2", None, "lm_head"),
        ("t5", None, "lm_head"),
        ("t5", "encoder.embed_tokens", None),
        ("bloom", "word_embeddings", None),
    ],
)
def test_tied_weights(model: str, embedding: str | None, head: str | None, tmp_path: Path) -> None:
    """An adapter on one of two tied layers changes that one only: merged, unmerged, and after a reload."""
    base: Any = MAKE[model]()
    before, plain = snapshot(base), logits(base)
    view = PeftModel(base, LoraConfig(r=4, target_modules=[str(embedding or head)]))
    stir(view.adapters, by=0.3)
    adapted = logits(view)
    far(adapted, plain)
    view.merge_adapter()
    close(logits(base), adapted, 1e-5)
    view.unmerge_adapter()
    assert_same(base, before)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    merged: Any = view.merge_and_unload()
    close(logits(merged), adapted, 1e-5)
    merged.save_pretrained(tmp_path)
    close(logits(type(base).from_pretrained(tmp_path).eval().requires_grad_(False)), adapted, 1e-5)


@pairs(3, cases=MERGED)
def test_what_is_not_finite_is_refused_before_anything_is_written(case: str, model: str) -> None:
    view = view_on(model, case, "lora")
    before, identities = snapshot(view.base), {n: id(p) for n, p in view.base.named_parameters()}
    last = list(view.get_adapter("a").parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1] = float("nan")
    for merge in (view.merge_adapter, view.merge_and_unload):
        with pytest.raises(ValueError, match=r"not finite\. Nothing was changed"):
            merge()
    assert_same(view.base, before)
    assert {n: id(p) for n, p in view.base.named_parameters()} == identities
    assert list(view.peft_config) == ["a", "b"]
    with torch.no_grad():
        last.zero_()
    view.merge_adapter()


def test_an_overflow_in_half_precision_is_refused() -> None:
    view = attach(MAKE["llama"]().half(), "llama", "lora")
    before = snapshot(view.base)
    with torch.no_grad():
        view.get_adapter("a").parts[0].method.B.fill_(1e5)  # finite in the adapter's fp32, infinite in fp16
    with pytest.raises(ValueError, match="not finite"):
        view.merge_adapter()
    assert_same(view.base, before)


@pairs(4, cases=["bottleneck", "bottleneck-parallel", "bottleneck-pfeiffer", "prompt", "prefix", "prefix-decoupled"])
def test_what_is_no_change_of_weights_is_refused(case: str, model: str) -> None:
    view = view_on(model, "lora", case)
    before, adapted = snapshot(view.base), logits(view)
    with pytest.raises(TypeError):
        view.merge_and_unload()
    if case.startswith("bottleneck"):
        with pytest.raises(TypeError, match="no map of weights"):
            view.merge_adapter()
    else:
        view.merge_adapter()  # the prompt or prefix stays beside the weights
        close(logits(view), adapted, 1e-5)
        far(logits(view), logits(view.base))
        view.unmerge_adapter()
    assert_same(view.base, before)
    assert torch.equal(logits(view), adapted)
    view.merge_and_unload(adapter_names=["a"])


def test_full_copies_are_merged_too() -> None:
    for model, name in (("bert", "classifier"), ("llama", "lm_head"), ("gpt2", "ln_f")):
        base = MAKE[model]()
        before = snapshot(base)
        view = PeftModel(base, replace(EVERY["lora"], modules_to_save=[name]))
        stir(view.adapters)
        adapted = logits(view)
        view.merge_adapter()
        close(logits(base), adapted, 1e-5)
        view.unmerge_adapter()
        assert_same(base, before)
        close(logits(view.merge_and_unload()), adapted, 1e-5)


def test_a_gate_per_row_cannot_be_merged() -> None:
    view = view_on("llama", "lora", "bitfit")
    before = snapshot(view.base)
    with pytest.raises(ValueError, match="gate per row"):
        view.merge_adapter(Sum("a", "b", weights=[torch.ones(3), 1.0]))
    assert_same(view.base, before)


def test_while_merged_the_base_is_not_the_base() -> None:
    base = MAKE["llama"]()
    one, two = attach(base, "llama", "lora"), attach(base, "llama", "bitfit")
    one.merge_adapter()
    with pytest.raises(RuntimeError, match="Another view has merged"):
        logits(two)
    for refused in (
        two.merge_adapter,
        one.merge_adapter,
        lambda: one.set_adapter(None),
        lambda: logits(one, adapters=[]),
        lambda: one.delete_adapter("a"),
    ):
        with pytest.raises(RuntimeError, match="erge"):
            refused()
    one.unmerge_adapter()
    logits(two)
    with pytest.raises(RuntimeError, match="Nothing is merged"):
        one.unmerge_adapter()


def test_originals_can_be_given_up() -> None:
    view = view_on("llama", "lora")
    view.merge_adapter(keep_original=False)
    with pytest.raises(RuntimeError, match="keep_original=False"):
        view.unmerge_adapter()


def test_generation_from_merged_equals_adapted() -> None:
    view = view_on("gpt2", "lora-all-linear", by=0.3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    adapted = view.generate(ids(), **options)
    view.merge_adapter()
    assert torch.equal(view.generate(ids(), **options), adapted)
    assert torch.equal(view.merge_and_unload().generate(ids(), **options), adapted)
