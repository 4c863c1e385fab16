"""What holds on a base of floats holds on a quantised one: every method on every quantiser that is installed."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import LoraConfig, PeftModel
from coadapt.core.adapter import ModuleCopy
from coadapt.core.method import WeightMethod
from coadapt.core.store import quantised, store_of
from laws.setting import EVERY, attach, close, far, fits, gradients, ids, logits, loss
from quant.quantisers import QUANTISERS, as_floats, make

CASES = [case for case in EVERY if fits(case, "llama")]


def pairs(turn: int, each_case: bool = False) -> Any:
    """Each quantiser with one case, and if asked for each case with one quantiser; which, says `turn`. The rest is
    `full`."""
    names, out = list(QUANTISERS), list[Any]()
    for i, name in enumerate(names):
        for j, case in enumerate(CASES):
            quick = (i + turn) % len(CASES) == j or (each_case and (j + turn) % len(names) == i)
            out.append(pytest.param(name, case, marks=() if quick else pytest.mark.full))
    return pytest.mark.parametrize(("name", "case"), out)


def apart(one: Tensor, other: Tensor) -> float:
    """The distance of two tensors, relative to the length of the second."""
    return float((one - other).detach().norm() / other.detach().norm().clamp(min=1e-12))


@pairs(0, each_case=True)
def test_as_on_the_dequantised_base(name: str, case: str) -> None:
    """Outputs and gradients of the adapter, and of what goes in, are those on the weights as plain floats."""
    within = QUANTISERS[name].within
    view, plain = attach(make(name), "llama", case), attach(as_floats(make(name)), "llama", case)
    plain.get_adapter("a").load_state_dict(view.get_adapter("a").state_dict())
    view.train()
    plain.train()
    found = []
    for one in (view, plain):
        torch.manual_seed(0)  # some draw while they train
        entered: list[Tensor] = []

        def enter(module: nn.Module, given: Any, y: Tensor, entered: list[Tensor] = entered) -> Tensor:
            entered.append(y.requires_grad_())
            y.retain_grad()
            return y

        hook = one.get_input_embeddings().register_forward_hook(enter)
        loss(one).backward()
        hook.remove()
        found.append((logits(one), gradients(one), entered[0].grad))
    (y, ours, dx), (wanted, theirs, dwanted) = found
    assert apart(y, wanted) < within
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert gradient is not None, key
        assert apart(gradient, theirs[key]) < max(8 * within, 1e-4), key  # type: ignore[arg-type]
    assert dx is not None, "no gradient came through"
    assert dwanted is not None
    assert apart(dx, dwanted) < max(8 * within, 1e-4)


def mergeable(view: PeftModel) -> bool:
    return all(isinstance(part.method, WeightMethod | ModuleCopy) for part in view.get_adapter("a").parts)


def on_quantised(view: PeftModel) -> bool:
    """Whether any of the layers that it adapts is a quantised one, or holds one."""
    packed = {module for _, module, _ in quantised(view.base)}
    return any(packed & set(part.place.module.modules()) for part in view.get_adapter("a").parts)


def packed(view: PeftModel) -> dict[str, list[Tensor]]:
    return {path: [t.clone() for t in store.parts(module)] for path, module, store in quantised(view.base)}


def same_tensors(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> None:
    assert one.keys() == other.keys()
    for path, tensors in one.items():
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, other[path], strict=True)), path


@pytest.mark.parametrize("into", ["dequantised", "quantised"])
@pairs(4)
def test_merging_and_exact_unmerging(name: str, case: str, into: str) -> None:
    view = attach(make(name), "llama", case)
    before, plain, classes = packed(view), logits(view.base), {n: type(m) for n, m in view.base.named_modules()}
    y = logits(view)
    same_tensors(packed(view), before)
    if not mergeable(view):
        return
    if not on_quantised(view):
        with pytest.raises(ValueError, match="none of the layers"):
            view.merge_adapter(into=into)
        view.merge_adapter()
        close(logits(view), y, 1e-5)
        view.unmerge_adapter()
        return
    report = view.merge_adapter(into=into)
    assert report is not None
    assert report.into == into
    merged = logits(view)
    far(merged, plain)
    assert torch.equal(merged, logits(view.base)), "what is merged is not applied again"
    left = {path for path, _, _ in quantised(view.base)}
    if into == "dequantised":
        assert apart(merged, y) < max(2 * QUANTISERS[name].within, 1e-5)
        assert report.rows == [] or not left & {row.path for row in report.rows}
    else:
        assert left == before.keys()
        lost = report.lost("quantised")
        assert lost is not None
        # what is lost of weights grows through the layers
        assert apart(merged, y) < max(8 * lost, 2 * QUANTISERS[name].within, 1e-4)
    view.unmerge_adapter()
    same_tensors(packed(view), before)
    assert torch.equal(logits(view.base), plain)
    assert torch.equal(logits(view), y)
    assert {n: type(m) for n, m in view.base.named_modules()} == classes


@pairs(8)
def test_a_row_of_a_mixed_batch_is_that_row_alone(name: str, case: str) -> None:
    view = attach(make(name), "llama", case, "lora")
    tokens = ids(4)
    names: list[Any] = ["a", None, "b", "a"]
    mixed = logits(view, tokens, adapter_names=names)
    for row, adapter in enumerate(names):
        alone = logits(view, tokens[row : row + 1], adapter_names=[adapter])
        close(mixed[row : row + 1], alone, max(2 * QUANTISERS[name].within, 2e-5))
    far(mixed[2], logits(view.base, tokens)[2])


@pairs(13)
def test_saved_and_loaded(name: str, case: str, tmp_path: Path) -> None:
    """Also that the base is known again: another fingerprint would be a warning."""
    view = attach(make(name), "llama", case)
    y = logits(view)
    view.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(name), tmp_path)
    assert torch.equal(logits(loaded), y)


def test_another_base_is_told_apart(tmp_path: Path) -> None:
    """The same weights quantised otherwise, or others quantised alike."""
    attach(make("bnb-nf4"), "llama", "lora").save_pretrained(tmp_path)
    other = make("bnb-nf4")
    store_of(other.model.layers[1].mlp.up_proj).write(other.model.layers[1].mlp.up_proj, torch.randn(128, 64))
    for base in (make("bnb-fp4"), other):
        with pytest.warns(UserWarning, match="other weights"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("name", QUANTISERS)
def test_copies(name: str) -> None:
    view = attach(make(name), "llama", "lora")
    y = logits(view)
    assert torch.equal(logits(copy.deepcopy(view)), y)
    view.merge_adapter()
    again = copy.deepcopy(view)
    merged = logits(view)
    assert torch.equal(logits(again), merged)
    again.unmerge_adapter()
    view.unmerge_adapter()
    assert torch.equal(logits(again), logits(view))
    if QUANTISERS[name].library == "torchao":
        return  # its layers cannot be pickled by themselves (docs/limits.md)
    assert torch.equal(logits(pickle.loads(pickle.dumps(view))), y)


@pytest.mark.parametrize("name", QUANTISERS)
def test_no_weight_is_kept_as_floats(name: str) -> None:
    """Not by the base for its own backward either, where its library would."""
    view = attach(make(name), "llama", "lora-all-linear").train()
    shapes = {tuple(store.shape(module)) for _, module, store in quantised(view.base)}
    shapes |= {shape[::-1] for shape in shapes}
    shapes -= {tuple(view.base.lm_head.weight.shape), tuple(view.base.lm_head.weight.shape)[::-1]}
    floats: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and type(tensor) is Tensor and tuple(tensor.shape) in shapes:
            floats.append(tuple(tensor.shape))
        return tensor

    def count(call: Any) -> int:
        floats.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            call(torch.randint(3, 30, (2, 5)))
        return len(floats)

    hook = view.get_input_embeddings().register_forward_hook(lambda *a: a[2].requires_grad_())
    assert count(view.base) == count(view) == 0
    hook.remove()


@pytest.mark.parametrize("name", QUANTISERS)
def test_the_base_is_as_it_was_when_the_last_view_goes(name: str) -> None:
    base = make(name)
    before = {n: (type(m), set(vars(m))) for n, m in base.named_modules()}
    view = attach(base, "llama", "lora")
    logits(view)
    view.merge_adapter()
    view.unload()
    assert {n: (type(m), set(vars(m))) for n, m in base.named_modules()} == before


@pytest.mark.parametrize("name", QUANTISERS)
def test_merged_for_good(name: str) -> None:
    view = attach(make(name), "llama", "lora")
    y = logits(view)
    merged: Any = view.merge_and_unload()
    assert not list(quantised(merged))
    assert all(type(m) is nn.Linear for n, m in merged.named_modules() if n.endswith("_proj"))
    assert apart(logits(merged), y) < max(2 * QUANTISERS[name].within, 1e-5)
    kept: Any = attach(make(name), "llama", "lora").merge_and_unload(into="quantised")
    assert len(list(quantised(kept))) == 14


def test_into_needs_a_quantised_base() -> None:
    view = attach(as_floats(make("bnb-nf4")), "llama", "lora")
    with pytest.raises(ValueError, match="none of the layers"):
        view.merge_adapter(into="quantised")
    quantised_view = attach(make("bnb-nf4"), "llama", "lora")
    with pytest.raises(ValueError, match="not one of"):
        quantised_view.merge_adapter(into="original")
    quantised_view.merge_adapter()
    with pytest.raises(ValueError, match="too late"):
        quantised_view.merge_and_unload(into="quantised")


@pytest.mark.parametrize("name", ["bnb-nf4", "torchao-int8-dynamic"])
def test_training_goes_on_after_an_evaluation(name: str) -> None:
    """Where the library packs weights anew for inference, or hands no gradient on, training is as if it did not."""
    view = attach(make(name), "llama", "lora-all-linear").train()
    loss(view).backward()
    first = gradients(view)
    view.eval()
    with torch.no_grad():
        logits(view)
    view.train()
    loss(view).backward()
    for key, gradient in gradients(view).items():
        assert gradient is not None
        assert torch.equal(gradient, first[key]), key  # type: ignore[arg-type]


def test_a_base_that_was_asked_before_is_taken() -> None:
    base = make("bnb-nf4-double")
    with torch.no_grad():
        base(ids())
    view = PeftModel(base, LoraConfig(r=2, init_lora_weights=False))
    loss(view.train()).backward()
    assert all(g is not None for g in gradients(view).values())
