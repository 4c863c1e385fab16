"""State that goes on: distributed checkpoints, a Trainer's file, and what training needs beyond inference."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from coadapt import (
    BottleneckConfig,
    Learned,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    Sum,
    get_peft_model,
)
from models import ids, llama, logits, stir, t5


def view(seed: int = 1) -> PeftModel:
    """Names that have dots, or that modules use themselves."""
    made = get_peft_model(llama(), LoraConfig(r=2, modules_to_save=["lm_head"]), "v1.2")
    made.add_adapter("weight", PromptTuningConfig(num_virtual_tokens=2))
    made.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True))
    made.add_adapter("bottleneck", BottleneckConfig(bottleneck_size=3, adapter_layer_norm="before"))
    stir(made.adapters, seed=seed)
    made.set_adapter(Sum("v1.2", "bottleneck", "weight", "prefix", weights=[Learned(0.5), 1.0, 1.0, 1.0]))
    return made.eval()


def step(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.param_groups({"v1.2": 1e-2, "weight": 1e-1}), lr=1e-3)


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints_functions(flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    first, second = view(1), view(2)
    theirs, ours = optimizer_of(first), optimizer_of(second)
    step(first, theirs)
    model_state = deepcopy(get_model_state_dict(first, options=options))
    optimizer_state = deepcopy(get_optimizer_state_dict(first, theirs, options=options))
    assert not [k for k in model_state if k.startswith("base.")]
    assert {k for k in model_state if not k.endswith("_extra_state")} == {
        n for n, _ in first.named_parameters() if not n.startswith("base.")
    }
    set_model_state_dict(second, model_state, options=options)
    set_optimizer_state_dict(second, ours, optimizer_state, options=options)
    for _ in range(2):
        step(first, theirs), step(second, ours)
    with torch.no_grad():
        assert torch.equal(logits(first), logits(second))


@pytest.mark.xfail(
    strict=True,
    raises=KeyError,
    reason="PyTorch takes every frozen parameter out of the state_dict, which does not hold the base's",
)
def test_trainable_parameters_only() -> None:
    model = view()
    model.freeze("bottleneck")
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    assert state and not [k for k in state if "bottleneck" in k]


# ---- what a stock Trainer writes: the state_dict as model.safetensors ------------------------------------------------


def trainers(folder: Path, model: PeftModel) -> Path:
    folder.mkdir(exist_ok=True)
    state = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_trainers_file_is_read(tmp_path: Path) -> None:
    model = view()
    model.freeze("weight")
    again = PeftModel.from_pretrained(llama(), trainers(tmp_path, model), is_trainable=True)
    with torch.no_grad():
        assert torch.equal(logits(again.eval()), logits(model))
    assert again.trainable() == ["v1.2", "prefix", "bottleneck"]
    assert again.get_adapter("prefix").shared is not None
    again.save_pretrained(tmp_path / "folder")
    third = PeftModel.from_pretrained(llama(), tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(logits(third), logits(model))


def test_a_trainers_file_that_does_not_fit(tmp_path: Path) -> None:
    file = trainers(tmp_path, view()) / "model.safetensors"
    state = load_file(file)
    one, two, *_ = sorted(k for k in state if "lora" in k)
    save_file({**{k: v for k, v in state.items() if k != one}, two: state[two][:1].clone(), "x": state[two]}, file)
    with pytest.raises(ValueError, match="3 of its tensors") as caught:
        PeftModel.from_pretrained(llama(), tmp_path)
    assert all(k in str(caught.value) for k in (one, two, "x: not in this adapter"))
    save_file({k: v for k, v in state.items() if k != "_extra_state"}, file)
    with pytest.raises(ValueError, match="holds a model, not the adapters"):
        PeftModel.from_pretrained(llama(), tmp_path)
    save_file({**state, "_extra_state": torch.tensor(list(b"[]"), dtype=torch.uint8)}, file)
    with pytest.raises(ValueError, match="extra state"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_state_of_other_adapters_is_refused() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4))
    state = model.state_dict()
    with pytest.raises(ValueError, match="lora_alpha=4 there, 8 here"):
        get_peft_model(llama(), LoraConfig(r=2, lora_alpha=8)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"adapters \['default'\], the view has \['other'\]"):
        get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4), "other").load_state_dict(state)
    get_peft_model(llama(), LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1)).load_state_dict(state)


# ---- a prefix's projection -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [llama, t5])
def test_a_projection_survives_a_resume(base: Any, tmp_path: Path) -> None:
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=12)
    model = get_peft_model(base(), config)
    stir(model.adapters)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).eval()
    for each in (model.eval(), again):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            each(input_ids=ids(), labels=ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(model.get_adapter("default").weight, again.get_adapter("default").weight)


@pytest.mark.parametrize("base", [llama, t5])
def test_the_file_for_inference_alone_is_for_inference(base: Any, tmp_path: Path) -> None:
    model = get_peft_model(base(), PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True))
    stir(model.adapters)
    model.save_pretrained(tmp_path)
    (tmp_path / "training_state.safetensors").unlink()
    alone = PeftModel.from_pretrained(base(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(logits(alone), logits(model.eval()), atol=1e-6)
    with pytest.raises(ValueError, match=r"training_state\.safetensors is\s+missing"):
        PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)


def test_two_files_of_different_adapters(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        model = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True))
        stir(model.adapters, seed=seed)
        model.save_pretrained(tmp_path / name)
    (tmp_path / "a" / "training_state.safetensors").replace(tmp_path / "b" / "training_state.safetensors")
    with pytest.raises(ValueError, match="different adapters"):
        PeftModel.from_pretrained(llama(), tmp_path / "b")
