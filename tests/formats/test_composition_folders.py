"""A composition is one folder: one sub-folder per adapter, what is active, which train, and the learned gates."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coadapt import Learned, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, Seq, Sum, get_peft_model
from coadapt.core.composition import Node, key, trained_gates
from coadapt.formats.compositions import node_from_json, node_to_json
from models import gpt2, llama, logits, stir


def several() -> PeftModel:
    view = get_peft_model(llama(), LoraConfig(r=2), "task")
    view.add_adapter("style", LoraConfig(r=3, target_modules="all-linear"))
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    view.add_adapter("v1.2", PrefixTuningConfig(num_virtual_tokens=2))
    stir(view.adapters)
    return view.eval()


def equal(view: PeftModel, again: PeftModel, **options: Any) -> bool:
    with torch.no_grad():
        return torch.equal(logits(view, **options), logits(again.eval(), **options))


# ---- as JSON ---------------------------------------------------------------------------------------------------------

gates = st.floats(-4, 4).filter(bool)
compositions = st.recursive(
    st.sampled_from(["a", "b", "v1.2", "self_attn"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda c: Seq(*c))
        | st.lists(st.tuples(inner, gates), max_size=3).map(
            lambda p: Sum(*[c for c, _ in p], weights=[w for _, w in p])
        )
    ),
    max_leaves=8,
)


@given(compositions)
def test_any_composition_comes_back(node: Node) -> None:
    assert key(node_from_json(json.loads(json.dumps(node_to_json(node))))) == key(node)


def test_learned_gates_come_back_and_one_that_is_used_twice_stays_one() -> None:
    one, other = Learned(0.5), Learned(2.0)
    node = Sum(Seq("a", Sum("b", weights=[one])), "c", "d", weights=[0.25, other, one])
    said = json.loads(json.dumps(node_to_json(node)))
    again = node_from_json(said)
    assert [round(float(g().detach()), 6) for g in trained_gates(again)] == [
        round(float(g().detach()), 6) for g in trained_gates(node)
    ]
    assert again.weights[2] is again.children[0].children[1].weights[0]
    assert again.weights[1] is not again.weights[2]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_learned_gate_that_ran_away_can_still_be_read(value: float) -> None:
    gate = Learned()
    with torch.no_grad():
        gate.log_gate.fill_(math.log(value) if value > 0 else -math.inf)
    assert len(trained_gates(node_from_json(json.loads(json.dumps(node_to_json(Sum("a", weights=[gate]))))))) == 1


@pytest.mark.parametrize("said", [3, None, {"sum": ["a"]}, {"sum": ["a"], "weights": ["x"]}, {"seq": "a"}, ["a"]])
def test_anything_else_is_refused(said: Any) -> None:
    with pytest.raises(ValueError, match="composition"):
        node_from_json(said)


def test_a_gate_per_row_cannot_be_saved(tmp_path: Path) -> None:
    view = several()
    view.set_adapter(Sum("task", "style", weights=[1.0, torch.tensor([0.0, 1.0, 0.5])]))
    with pytest.raises(ValueError, match="one batch"):
        view.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- as a folder -----------------------------------------------------------------------------------------------------


def test_a_composition_is_one_folder(tmp_path: Path) -> None:
    view = several()
    gate = Learned(0.3)
    view.set_adapter(Seq("v1.2", "prompt", Sum("task", "style", weights=[gate, -0.5])))
    view.trainable("style", "prompt")
    with torch.no_grad():
        gate.log_gate.add_(0.123456789)
    view.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["composition.json", "composition.safetensors", "prompt", "style", "task", "v1.2"]
    )
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert equal(view, again)
    assert again.trainable() == [] and not any(p.requires_grad for p in again.gates.parameters())
    trained = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert trained.trainable() == ["style", "prompt"] and equal(view, trained)
    assert all(p.requires_grad for p in trained.gates.parameters())


def test_each_part_is_an_adapter_folder_by_itself(tmp_path: Path) -> None:
    view = several()
    view.set_adapter("task + style")
    view.save_pretrained(tmp_path)
    for name in ("task", "style", "prompt", "v1.2"):
        alone = PeftModel.from_pretrained(llama(), tmp_path / name)
        picked = PeftModel.from_pretrained(llama(), tmp_path, adapter_name=name, is_trainable=True)
        with torch.no_grad():
            expected = logits(view, adapters=[name])
            assert torch.equal(logits(alone), expected) and torch.equal(logits(picked.eval()), expected)
        assert alone.active_adapters == ["default"] and picked.active_adapters == [name] == picked.trainable()
    other = get_peft_model(llama(), LoraConfig(), "mine")
    other.load_adapter(tmp_path / "task", "yours")
    other.load_adapter(tmp_path, "style")
    assert list(other.peft_config) == ["mine", "yours", "style"] and other.active_adapters == ["mine"]
    with pytest.raises(ValueError, match=r"task, style, prompt, v1\.2; 'stile' is not among them"):
        other.load_adapter(tmp_path, "stile")


def test_some_of_several(tmp_path: Path) -> None:
    view = several()
    view.set_adapter("task + 0.5*style")
    view.save_pretrained(tmp_path, selected_adapters=["style", "prompt"])
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert sorted(again.peft_config) == ["prompt", "style"]
    assert not (tmp_path / "task").exists()
    with torch.no_grad():
        assert torch.equal(logits(again), logits(view, adapters=["style", "prompt"]))


def test_default_lies_in_the_folder_itself(tmp_path: Path) -> None:
    view = get_peft_model(gpt2(), LoraConfig(r=2))
    view.add_adapter("other", LoraConfig(r=3))
    stir(view.adapters)
    view.set_adapter("default + 2*other")
    view.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and (tmp_path / "composition.json").is_file()
    assert equal(view.eval(), PeftModel.from_pretrained(gpt2(), tmp_path))
    view.set_adapter("default")
    view.save_pretrained(tmp_path, selected_adapters=["default"])
    assert not (tmp_path / "composition.json").exists()
    assert list(PeftModel.from_pretrained(gpt2(), tmp_path).peft_config) == ["default"]


def test_nothing_active_stays_nothing_active(tmp_path: Path) -> None:
    view = get_peft_model(gpt2(), LoraConfig(init_lora_weights=False))
    view.set_adapter(Sum())
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert again.active_adapters == [] and torch.equal(logits(again), logits(gpt2()))


def test_gates_that_are_gone_leave_no_file(tmp_path: Path) -> None:
    view = several()
    view.set_adapter(Sum("task", "style", weights=[Learned(0.5), Learned(2.0)]))
    view.save_pretrained(tmp_path)
    assert (tmp_path / "composition.safetensors").is_file()
    view.set_adapter("task")
    view.save_pretrained(tmp_path)
    assert not (tmp_path / "composition.safetensors").exists()
    assert PeftModel.from_pretrained(llama(), tmp_path).active_adapters == ["task"]


# ---- what others may have written ------------------------------------------------------------------------------------


def change(folder: Path, **fields: Any) -> None:
    file = folder / "composition.json"
    file.write_text(json.dumps({k: v for k, v in {**json.loads(file.read_text()), **fields}.items() if v is not None}))


@pytest.mark.parametrize("name", ["../x", "/etc", "..", "a/b", "a\\b", ".hidden", "", 3])
def test_names_never_leave_the_folder(name: Any, tmp_path: Path) -> None:
    view = get_peft_model(llama(), LoraConfig(r=2), "task")
    view.save_pretrained(tmp_path / "x")
    view.save_pretrained(tmp_path / "inside")
    change(tmp_path / "inside", adapters=[name], composition=name)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        PeftModel.from_pretrained(llama(), tmp_path / "inside")


@pytest.mark.parametrize(
    "said, part",
    [
        ({"composition": "tusk"}, r"composition of 'tusk'.*among its adapters task, style.*Did you mean 'task'"),
        ({"composition": {"seq": ["task", "tusk", "style"]}}, "composition of 'tusk'"),
        ({"adapters": ["task", "style", "task"]}, "lists 'task' more than once"),
    ],
)
def test_a_composition_that_contradicts_its_list(said: dict[str, Any], part: str, tmp_path: Path) -> None:
    """Nothing of it is attached then, to a view that is there as well."""
    view = get_peft_model(llama(), LoraConfig(r=2), "task")
    view.add_adapter("style", LoraConfig(r=2))
    view.save_pretrained(tmp_path)
    change(tmp_path, **said)
    other = get_peft_model(llama(), LoraConfig(r=2), "there")
    for model in (other, llama()):
        with pytest.raises(ValueError, match=part):
            PeftModel.from_pretrained(model, tmp_path)
    assert list(other.peft_config) == other.active_adapters == ["there"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    view = several()
    view.set_adapter(Sum("task", "style", weights=[Learned(0.5), 1.0]))
    view.save_pretrained(tmp_path)
    change(tmp_path, composition=None)
    with pytest.raises(ValueError, match="does not say composition"):
        PeftModel.from_pretrained(llama(), tmp_path)
    change(tmp_path, composition="task", schema=99)
    with pytest.raises(ValueError, match="schema 99"):
        PeftModel.from_pretrained(llama(), tmp_path)
    change(tmp_path, composition="nobody", schema=1)
    with pytest.raises(ValueError, match="nobody"):
        PeftModel.from_pretrained(llama(), tmp_path)
    change(tmp_path, composition={"sum": ["task"], "weights": [{"learned": 0, "value": 1}]})
    (tmp_path / "composition.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"composition\.safetensors is missing"):
        PeftModel.from_pretrained(llama(), tmp_path)
    (tmp_path / "style" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"style.*adapter_config\.json"):
        PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "composition.json", "README.md", "notes.txt"])
def test_a_name_that_is_a_file_already(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    view = get_peft_model(llama(), LoraConfig(r=2), name)
    with pytest.raises(ValueError, match="a file there has that name"):
        view.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_of_one_adapter_goes_by_any_name(tmp_path: Path) -> None:
    """Also where it says more than the adapter itself, as a trained one says its rate."""
    view = get_peft_model(llama(), LoraConfig(r=2))
    stir(view.adapters)
    view.param_groups({"default": 1e-3})
    view.save_pretrained(tmp_path)
    assert (tmp_path / "composition.json").is_file()
    again = PeftModel.from_pretrained(llama(), tmp_path, adapter_name="task", is_trainable=True)
    again.load_adapter(tmp_path, "other")
    assert (again.active_adapters, list(again.peft_config)) == (["task"], ["task", "other"])
    assert again.get_adapter("task").learning_rate == 1e-3
    assert torch.equal(logits(again.eval()), logits(view.eval()))
