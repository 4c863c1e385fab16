"""P-Tuning: files hold what inference needs; the encoder survives a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coadapt import PeftModel, PromptEncoderConfig, get_peft_model
from models import llama, logits, stir, t5


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("make", [llama, t5])
def test_the_encoder_survives_and_files_hold_the_tokens(kind: str, make: Any, tmp_path: Path) -> None:
    sites = ["encoder", "decoder"] if make is t5 else None
    options = {"num_virtual_tokens": 3, "encoder_reparameterization_type": kind, "encoder_hidden_size": 8}
    view = get_peft_model(make(), PromptEncoderConfig(**options, prompt_sites=sites))
    stir(view.adapters)
    expected = logits(view.eval())
    view.save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in written.items()} == {"prompt_embeddings": (6 if sites else 3, 32)}
    again = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(again.eval()), expected)
    ours, theirs = (dict(v.get_adapter("default").named_parameters()) for v in (view, again))
    assert len(ours) > 4
    assert all(torch.equal(ours[n], theirs[n]) and theirs[n].requires_grad for n in ours)
    (tmp_path / "training_state.safetensors").unlink()
    plain = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(plain), expected)
    assert sum(p.numel() for p in plain.get_adapter("default").parameters()) == written["prompt_embeddings"].numel()
    with pytest.raises(ValueError, match=r"P_TUNING.*training_state\.safetensors is missing"):
        PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)


def test_options_without_effect() -> None:
    for options in (
        {"encoder_num_layers": 3},
        {"encoder_dropout": 0.1},
        {"encoder_reparameterization_type": None, "encoder_hidden_size": 4},
    ):
        with pytest.raises(ValueError, match="no effect"):
            PromptEncoderConfig(num_virtual_tokens=2, **options)
    with pytest.raises(ValueError, match="'GRU' is not one of"):
        PromptEncoderConfig(num_virtual_tokens=2, encoder_reparameterization_type="GRU")
