"""Gates that are data: one number a row of the batch, and gates that are learned."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from coadapt import BottleneckConfig, Learned, LoraConfig, PeftModel, Seq, Sum
from laws.setting import MAKE, close, far, few, gradients, ids, logits, loss, pairs, stir, view_on

GATED = ["lora", "lora-all-linear", "lora-bias", "bottleneck", "bottleneck-parallel", "bitfit", "prefix-decoupled"]


@pairs(0, cases=[*GATED, "prefix", "prefix-projected"])
def test_a_gate_per_row_is_that_number_for_that_row(case: str, model: str) -> None:
    view = view_on(model, case, "lora")
    first, second = torch.tensor([1.0, 0.25, 2.0]), torch.tensor([0.0, 1.0, -1.0])
    mixed = logits(view, adapters=Sum("a", "b", weights=[first, second]))
    for b in range(3):
        expected = logits(view, ids()[b : b + 1], adapters=Sum("a", "b", weights=[float(first[b]), float(second[b])]))
        close(mixed[b], expected[0], 5e-6)


@pairs(3, cases=[*GATED, "prefix"], models=("llama", "gpt2", "qwen3"))
def test_a_gate_per_token_that_is_the_same_for_a_row_is_a_gate_per_row(case: str, model: str) -> None:
    view = view_on(model, case, "lora")
    rows = torch.tensor([1.0, 0.25, 2.0])
    tokens = rows[:, None].expand(3, ids().shape[1])
    expected = logits(view, adapters=Sum("a", "b", weights=[rows, 0.5]))
    close(logits(view, adapters=Sum("a", "b", weights=[tokens, 0.5])), expected, 5e-6)


def test_a_sequence_split_between_adapters() -> None:
    """What AdapterHub calls Split: no token mixes with others here, so each part is as its adapter alone makes it."""
    view = PeftModel(MAKE["plain"]())
    for name, config in (
        ("a", LoraConfig(target_modules=["first"])),
        ("b", BottleneckConfig(target_modules=["second"])),
    ):
        view.add_adapter(name, config)
        stir(view.get_adapter(name), by=0.5)
    first = torch.zeros(3, ids().shape[1])
    first[:, :3] = 1.0
    first[1, 3] = 1.0
    split = logits(view, adapters=Sum("a", "b", weights=[first, 1 - first]))
    expected = torch.where(first[..., None] == 1, logits(view, adapters="a"), logits(view, adapters="b"))
    close(split, expected, 5e-6)
    far(split, logits(view, adapters="a + b"))


def test_a_causal_token_sees_what_earlier_ones_were_given() -> None:
    """The first tokens equal the adapter alone; the later ones read keys and values that the other has made."""
    view = view_on("llama", "lora-all-linear", "lora-all-linear", by=0.3)
    first = torch.zeros(3, ids().shape[1])
    first[:, :3] = 1.0
    split = logits(view, adapters=Sum("a", "b", weights=[first, 1 - first]))
    close(split[:, :3], logits(view, adapters="a")[:, :3], 5e-6)
    far(split[:, 3:], logits(view, adapters="b")[:, 3:])
    with pytest.raises(ValueError, match=r"was given for \(3, 7\) tokens, and .* has \(3, 1\)"):
        view.generate(
            ids(), adapters=Sum("a", weights=[first]), max_new_tokens=2, attention_mask=torch.ones_like(ids())
        )


@pairs(1, cases=GATED)
def test_one_hot_rows_equal_adapter_names(case: str, model: str) -> None:
    view = view_on(model, case, "lora")
    chosen = torch.tensor([1.0, 0.0, 0.0])
    by_gate = logits(view, adapters=Sum("a", "b", weights=[chosen, 1 - chosen]))
    close(by_gate, logits(view, adapter_names=["a", "b", "b"]), 5e-6)


def test_one_adapter_twice_with_dropout() -> None:
    view = PeftModel(MAKE["llama"](), LoraConfig(r=2, lora_dropout=1e-9, init_lora_weights=False), "a").train()
    rows = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])]
    twice = logits(view, adapters=Sum("a", "a", weights=rows))
    close(twice, logits(view, adapters=Sum("a", weights=[rows[0] + rows[1]])), 1e-5)


@few
@given(gates=st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4), data=st.data())
def test_gates_inside_of_rows(gates: list[float], data: st.DataObject) -> None:
    """adapter_names and gates together: each row has a composition, with gates of its own."""
    view = VIEW
    names: list[Any] = [data.draw(st.sampled_from(["a", "b", None])) for _ in range(2)]
    names += [Sum("a", "b", weights=gates[:2]), Seq(Sum("a", weights=[gates[2]]), Sum("b", weights=[gates[3]]))]
    mixed = logits(view, ids(4), adapter_names=names)
    for b, node in enumerate(names):
        close(mixed[b], logits(view, ids(4)[b : b + 1], adapters=node or [])[0], 5e-6)


VIEW = view_on("llama", "lora", "bottleneck")


@pairs(2, cases=[*GATED, "prompt"], models=("gpt2", "bloom", "bert", "plain"))
def test_a_learned_gate_is_its_number_and_learns(case: str, model: str) -> None:
    """Its gradient is the slope of the loss, measured by a difference in double precision."""
    view = view_on(model, case, "lora").double()
    gate = Learned(0.6).double()
    view.set_adapter(Sum("a", "b", weights=[gate, 0.5]))
    fixed = logits(view, adapters=Sum("a", "b", weights=[0.6, 0.5]))
    torch.testing.assert_close(logits(view), fixed, rtol=1e-6, atol=1e-6)
    loss_of(view).backward()
    found = gradients(view)["gates.0.log_gate"]
    assert found is not None
    torch.testing.assert_close(found, slope(view, gate), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("case", ["prefix", "prefix-projected"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", "bert"])
def test_a_learned_gate_of_a_joint_prefix(case: str, model: str) -> None:
    view = view_on(model, case, "lora")
    gate = Learned(0.6)
    view.set_adapter(Sum("a", "b", weights=[gate, 0.5]))
    close(logits(view), logits(view, adapters=Sum("a", "b", weights=[0.6, 0.5])), 5e-6)
    loss(view).backward()
    found = gradients(view)["gates.0.log_gate"]
    assert found is not None
    assert float(found.abs()) > 0


def loss_of(view: Any) -> torch.Tensor:
    out = logits(view)
    return (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)).pow(2).sum()


def slope(view: Any, gate: Learned, by: float = 1e-4) -> torch.Tensor:
    with torch.no_grad():
        start = gate.log_gate.clone()
        gate.log_gate.copy_(start + by)
        up = loss_of(view)
        gate.log_gate.copy_(start - by)
        down = loss_of(view)
        gate.log_gate.copy_(start)
    return (up - down) / (2 * by)


def test_learned_gates_are_parameters_of_the_view() -> None:
    view = view_on("llama", "lora", "prompt")
    gate = Learned(2.0)
    view.set_adapter(Sum("a", "b", weights=[gate, Learned(0.5)]))
    assert [n for n, _ in view.named_parameters() if n.startswith("gates")] == ["gates.0.log_gate", "gates.1.log_gate"]
    assert math.isclose(float(gate().detach()), 2.0, rel_tol=1e-6)
    groups = view.param_groups({"a": 1e-3, "gates": {"lr": 1e-2}})
    assert {g["name"]: g.get("lr") for g in groups} == {"a": 1e-3, "b": None, "gates": 1e-2}
    assert [p for g in groups if g["name"] == "gates" for p in g["params"]] == list(view.gates.parameters())
    optimizer = torch.optim.SGD(view.param_groups({"gates": 0.1}), lr=0.0)
    before = gate.log_gate.detach().clone()
    loss(view).backward()
    optimizer.step()
    assert not torch.equal(gate.log_gate, before)


def test_gates_that_cannot_be() -> None:
    for wrong in (float("nan"), float("inf"), "much", True, torch.ones(2, 2, 2)):
        with pytest.raises(ValueError, match=r"[Gg]ate"):
            Sum("a", weights=[wrong])
    with pytest.raises(ValueError, match="2 children and 1 weights"):
        Sum("a", "b", weights=[1])
    with pytest.raises(ValueError, match="above 0"):
        Learned(0.0)
    view = view_on("llama", "lora")
    with pytest.raises(ValueError, match="2 rows"):
        logits(view, adapters=Sum("a", weights=[torch.ones(2)]))


def test_deleting_an_adapter_takes_its_gates_along() -> None:
    """However deep it stood: a gate with nothing behind it would go on training, for nothing."""
    view = view_on("llama", "lora", "lora", "lora")
    kept = Learned(0.5)
    inner = Sum(Seq("a", Sum("a", weights=[Learned(2.0)])), "b", weights=[Learned(3.0), kept])
    view.set_adapter(Seq(Sum(inner, weights=[0.5]), "a"))
    alone = logits(view, adapters=Sum("b", weights=[0.25]))
    view.delete_adapter("a")
    assert list(view.gates) == [kept]
    close(logits(view), alone)
    view.delete_adapter("b")
    assert repr(view.composition) == "nothing"
    assert not list(view.gates)


def test_an_adapter_that_a_router_chooses_is_not_deleted() -> None:
    view = view_on("llama", "lora", "lora", "lora")
    view.set_adapter("token_router(a, b)")
    before = logits(view)
    with pytest.raises(ValueError, match="chooses from"):
        view.delete_adapter("a")
    assert list(view.peft_config) == ["a", "b", "c"]
    assert torch.equal(logits(view), before)
    view.delete_adapter("c")
    assert torch.equal(logits(view), before)
