"""VB-LoRA's files for inference alone: which vectors, and their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coadapt import PeftModel, VBLoRAConfig, get_peft_model
from models import llama, logits, stir


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Any, Path]:
    view = get_peft_model(llama(), VBLoRAConfig(num_vectors=6, vector_length=8, topk=3, save_only_topk_weights=True))
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    return view.eval(), tmp_path


def test_they_hold_the_chosen_vectors_and_go_on_doing_so(folder: tuple[Any, Path], tmp_path: Path) -> None:
    view, where = folder
    tensors = load_file(where / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A_topk"
    assert tensors[f"{key}_indices"].dtype == torch.uint8
    assert tensors[f"{key}_weights"].shape[-1] == 2
    assert not any(k.endswith("logits_A") for k in tensors)
    loaded = PeftModel.from_pretrained(llama(), where)
    torch.testing.assert_close(logits(loaded), logits(view))
    loaded.save_pretrained(tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name])


def test_they_are_not_trained_on(folder: tuple[Any, Path]) -> None:
    _, where = folder
    with pytest.raises(ValueError, match="written with save_only_topk_weights, for inference"):
        PeftModel.from_pretrained(llama(), where, is_trainable=True)
    loaded = PeftModel.from_pretrained(llama(), where)
    loaded.unfreeze("default")
    loaded.train()
    with pytest.raises(RuntimeError, match="cannot be trained on"):
        logits(loaded)


def test_the_view_that_wrote_them_trains_on(folder: tuple[Any, Path]) -> None:
    view, _ = folder
    logits(view.train()).sum().backward()
    assert all(p.grad is not None for p in view.parameters() if p.requires_grad)
