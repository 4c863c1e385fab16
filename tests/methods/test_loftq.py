"""LoftQ: its quantiser against bitsandbytes', and that factors and codes together come nearer to the weight."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

from coadapt import LoraConfig, PeftModel, get_peft_model
from coadapt.inits.loftq import NF4, dequantised, quantised
from formats.field import far
from models import MODELS, logits, stir


def test_nf4_is_that_of_bitsandbytes() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, most = quantised(weight, 4)
    assert torch.equal(codes, packed.flatten())
    assert torch.equal(most.flatten(), state.absmax)
    assert torch.equal(torch.tensor(NF4), state.code)


@pytest.mark.parametrize("shape", [(5, 7), (3, 64), (9, 30)])
def test_codes_are_the_nearest_and_any_shape_goes(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    for bits, within in ((4, 0.16), (8, 0.004)):
        codes, most = quantised(weight, bits)
        back = dequantised(codes, most, shape)
        assert back.shape == shape
        assert far(back, weight) <= within * float(weight.abs().max())


@pytest.mark.parametrize("alpha", [4, 16])
def test_weight_and_factors_together_come_nearer(alpha: int) -> None:
    def off(steps: int, bits: int = 4) -> float:
        base = MODELS["llama"]()
        config = LoraConfig(
            r=4,
            lora_alpha=alpha,
            target_modules=["up_proj"],
            init_lora_weights="loftq",
            loftq_config={"loftq_iter": steps, "loftq_bits": bits},
        )
        view = get_peft_model(base, config)
        part = view.get_adapter("default").parts[0]
        method: Any = part.method
        weight = base.get_submodule(part.place.path).weight.detach()
        plain = float((weight - method.quantised()).norm())
        both = float((weight - method.merge(weight)).detach().norm())
        assert both < 0.9 * plain
        return both

    assert off(5) < off(1)
    assert off(1, 8) < 0.2 * off(1)


def test_files_hold_a_and_b_and_the_codes_are_worked_out_again(tmp_path: Path) -> None:
    base = MODELS["gpt2"]()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    view = get_peft_model(base, LoraConfig(r=4, init_lora_weights="loftq", loftq_config={"loftq_iter": 2})).eval()
    stir(view.adapters)
    assert all(torch.equal(v, before[k]) for k, v in view.get_base_model().state_dict().items())
    view.save_pretrained(tmp_path)
    assert {key.split(".")[-2] for key in load_file(tmp_path / "adapter_model.safetensors")} == {"lora_A", "lora_B"}
    assert torch.equal(logits(PeftModel.from_pretrained(MODELS["gpt2"](), tmp_path)), logits(view))
    with pytest.raises(ValueError, match="loftq_bits=3 is not one of"):
        LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 3})
