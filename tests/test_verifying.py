"""`verify` finds what would make training vain, says why, and leaves nothing changed."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import CASES
from coadapt import (
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Sum,
    TokenRouter,
    get_peft_model,
)
from coadapt.verifying import BASE, GRADIENT, MERGED, OUTPUT, SAVED, STEP
from laws.setting import config_of
from models import bert, gpt2, ids, llama, plain, t5
from steps import traces


def batch(**changes: Any) -> dict[str, Any]:
    return {"input_ids": ids(), "labels": ids(), **changes}


def failures(view: PeftModel, given: Any, **options: Any) -> list[tuple[str, str]]:
    return [(f.what, f.adapter) for f in view.verify(given, **options).failed]


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("bottleneck", "tokens", "glora")])
def test_all_is_well_with_every_method_and_nothing_is_left_changed(case: str) -> None:
    view = get_peft_model(gpt2(), config_of(case, "gpt2")).train()
    view(**batch()).loss.backward()
    before = [(n, p.detach().clone(), p.grad) for n, p in view.named_parameters()]
    drawn, base = torch.get_rng_state(), traces(view.base)
    report = view.verify(batch())
    assert report, str(report)
    assert {OUTPUT, GRADIENT, STEP, BASE, SAVED} <= {f.what for f in report.findings}
    assert MERGED in {f.what for f in report.findings} | report.skipped.keys()
    for (name, value, gradient), (_, now) in zip(before, view.named_parameters(), strict=True):
        assert torch.equal(value, now), name
        assert gradient is now.grad, name
    assert torch.equal(drawn, torch.get_rng_state())
    assert view.training
    assert traces(view.base) == base


def test_what_a_batch_does_not_reach_is_told_and_not_grave() -> None:
    view = get_peft_model(gpt2(), CASES["tokens"], adapter_name="a")
    rest = torch.full((2, 5), 40)
    report = view.verify({"input_ids": rest, "labels": rest})
    assert not any(f.grave for f in report.failed)
    dead = get_peft_model(gpt2(), CASES["bottleneck"]).verify(batch())
    assert not any(f.grave for f in dead.failed)
    assert "a ReLU that is off" in str(dead)


@pytest.mark.parametrize("make", [llama, t5, bert])
def test_a_mix_on_other_models(make: Any) -> None:
    view = get_peft_model(make(), LoraConfig(r=2), adapter_name="a")
    view.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=2))
    view.set_adapter("a + b")
    given = {"input_ids": ids(), "labels": torch.tensor([0, 1, 2]) if make is bert else ids()}
    report = view.check(given)
    assert report, str(report)
    assert str(report).count("ok ") == len(report.findings)


@pytest.mark.parametrize("router", ["token_router", "fusion", "task_router"])
def test_what_a_router_chooses_from(router: str) -> None:
    view = get_peft_model(llama(), LoraConfig(r=2), adapter_name="a")
    view.add_adapter("b", LoraConfig(r=2) if router == "fusion" else PrefixTuningConfig(num_virtual_tokens=2))
    view.add_adapter("c", LoraConfig(r=2))
    tasks = {"task_ids": [0, 1, 1]} if router == "task_router" else {}
    view.set_adapter(f"{router}(a, b, c{', num_tasks=2' if tasks else ''})")
    report = view.verify(batch(**tasks))
    assert report, str(report)
    assert [f.adapter for f in report.findings if f.what == OUTPUT] == ["a", "b", "c"]
    assert "depend on what goes in" in report.skipped[MERGED]


def test_whom_a_router_never_chooses() -> None:
    view = PeftModel(llama())
    for name in "ab":
        view.add_adapter(name, LoraConfig(r=2))
    view.set_adapter(Sum("a", "b", weights=TokenRouter(top_k=1)))
    with torch.no_grad():
        for bias in (p for n, p in view.gates.named_parameters() if n.endswith("bias")):
            bias.copy_(torch.tensor([9.0, -9.0]))
    assert failures(view, batch()) == [(OUTPUT, "b"), (GRADIENT, "b"), (STEP, "b")]


def test_a_gate_per_row_is_neither_merged_nor_saved() -> None:
    view = get_peft_model(llama(), LoraConfig(r=2), adapter_name="a")
    view.set_adapter(Sum("a", weights=[torch.tensor([1.0, 0.5, 0.0])]))
    report = view.verify(batch())
    assert report, str(report)
    assert list(report.skipped) == [MERGED, SAVED]


def test_masked_labels() -> None:
    view = get_peft_model(llama(), LoraConfig(r=2), adapter_name="a")
    report = view.verify(batch(labels=torch.full((3, 7), -100)))
    assert [(f.what, f.adapter) for f in report.failed] == [(GRADIENT, "a")]
    assert "masked (-100)" in str(report)


def test_a_gate_of_zero_and_an_adapter_that_takes_no_part() -> None:
    view = get_peft_model(llama(), LoraConfig(r=2), adapter_name="a")
    view.add_adapter("b", LoraConfig(r=2))
    view.add_adapter("c", PromptTuningConfig(num_virtual_tokens=2))
    view.set_adapter("a + 0*b")
    assert set(failures(view, batch())) == {(OUTPUT, "b"), (GRADIENT, "b"), (STEP, "b"), (GRADIENT, "c")}
    text = str(view.verify(batch()))
    assert "Its gate may be 0 in a + 0*b" in text
    assert "not in the composition" in text


class Bypass(nn.Module):
    """Reads a layer's weight itself, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = dict(self.inner.named_parameters()).values()  # not to be seen from its source
        return self.head(F.linear(x, weight, bias))


def test_a_kernel_that_bypasses_the_module() -> None:
    view = get_peft_model(Bypass(), LoraConfig(r=2, target_modules=["inner"]), adapter_name="a")
    assert {what for what, _ in failures(view, torch.randn(2, 4))} == {OUTPUT, GRADIENT, STEP, MERGED}
    assert "'inner' among them: a fused kernel" in str(view.verify(torch.randn(2, 4)))
    view.add_adapter("b", LoraConfig(r=2, target_modules=["inner", "head"]))
    view.set_adapter("b")
    found = [f for f in view.verify(torch.randn(2, 4)).failed if f.adapter == "b"]
    assert [f.what for f in found] == [GRADIENT, STEP]
    assert not any(f.grave for f in found), "the other half trains"


def test_something_that_detaches() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).detach()

    view = get_peft_model(Detached(), BottleneckConfig(target_modules=["inner"], bottleneck_size=2))
    report = view.verify(torch.randn(2, 4))
    assert not report
    assert "detaches what it gives" in str(report)


def test_a_loss_of_ones_own_and_what_is_not_tried() -> None:
    view = get_peft_model(plain(), LoraConfig(r=2, target_modules=["first"]))
    assert view.verify(ids(), loss=lambda out: out.square().mean())
    assert not view.verify(ids(), loss=lambda out: out.sum() * 0)
    report = view.verify(ids(), merge=False)
    assert report.skipped == {MERGED: "merge=False"}
    with pytest.raises(TypeError, match="verify needs a batch"):
        view.verify("text")
