"""diffusers' `load_lora_weights` on a pipeline of a few thousand parameters."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import moved
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def pipe(tokenizer: Any) -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **blocks,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=48, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, **sizes)
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **blocks,
    )
    tokenizer.model_max_length = 16
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def picture(pipe: Any, **options: Any) -> Tensor:
    seeded = torch.Generator().manual_seed(0)
    return pipe("abc", num_inference_steps=2, generator=seeded, output_type="latent", height=16, width=16, **options)[0]


def stored(pipe: Any, folder: Path, r: int = 4, text: bool = True, seed: int = 1) -> Path:
    """A folder of LoRA weights as diffusers writes them, of adapters that are taken off again."""
    torch.manual_seed(seed)
    parts = {"unet": (pipe.unet, LAYERS)} | (
        {"text_encoder": (pipe.text_encoder, ["q_proj", "v_proj"])} if text else {}
    )
    states = {}
    for name, (module, targets) in parts.items():
        module.add_adapter(peft.LoraConfig(r=r, lora_alpha=r, target_modules=targets, init_lora_weights=False))
        moved(module)
        states[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(module)
    type(pipe).save_lora_weights(str(folder), **states)
    for module, _ in parts.values():
        module.delete_adapters("default") if hasattr(module, "delete_adapters") else module.delete_adapter("default")
    return folder


def test_weights_are_loaded_scaled_fused_and_taken_off(pipe: Any, tmp_path: Path) -> None:
    plain = picture(pipe)
    folder = stored(pipe, tmp_path / "lora")
    assert torch.equal(picture(pipe), plain)
    pipe.load_lora_weights(str(folder))
    adapted = picture(pipe)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    tensors = {
        k.removeprefix("unet."): t for k, t in load_file(next(folder.glob("*.safetensors"))).items() if "unet" in k
    }
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(2, 3, layer.in_features)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    by_hand = x @ layer.weight.T + x @ tensors[f"{name}.lora_A.weight"].T @ tensors[f"{name}.lora_B.weight"].T
    torch.testing.assert_close(layer(x), by_hand)
    torch.testing.assert_close(picture(pipe, cross_attention_kwargs={"scale": 0.0}), plain)
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert not torch.allclose(half, adapted) and not torch.allclose(half, plain)
    torch.testing.assert_close(picture(pipe), adapted)
    pipe.fuse_lora()
    torch.testing.assert_close(picture(pipe), adapted, rtol=1e-4, atol=1e-5)
    pipe.unfuse_lora()
    torch.testing.assert_close(picture(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), plain)


def test_several_are_weighted(pipe: Any, tmp_path: Path) -> None:
    one = stored(pipe, tmp_path / "one", text=False)
    other = stored(pipe, tmp_path / "other", r=2, text=False, seed=2)
    pipe.load_lora_weights(str(one), adapter_name="one")
    alone = picture(pipe)
    pipe.load_lora_weights(str(other), adapter_name="other")
    pipe.set_adapters(["one", "other"], adapter_weights=[1.0, 0.5])
    assert not torch.allclose(picture(pipe), alone)
    pipe.set_adapters(["one", "other"], adapter_weights=[1.0, 0.0])
    torch.testing.assert_close(picture(pipe), alone)
    pipe.delete_adapters("other")
    pipe.set_adapters("one")
    torch.testing.assert_close(picture(pipe), alone)
    pipe.disable_lora()
    assert not torch.allclose(picture(pipe), alone)


@pytest.mark.parametrize("r", [4, 2, 6])
def test_weights_are_swapped_in_place(pipe: Any, tmp_path: Path, r: int) -> None:
    one = stored(pipe, tmp_path / "one", text=False)
    other = stored(pipe, tmp_path / "other", r=r, text=False, seed=2)
    pipe.load_lora_weights(str(other), adapter_name="style")
    wanted = picture(pipe)
    pipe.unload_lora_weights()
    if r != 4:
        pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(str(one), adapter_name="style")
    before = picture(pipe)
    pipe.load_lora_weights(str(other), adapter_name="style", hotswap=True)
    torch.testing.assert_close(picture(pipe), wanted)
    assert not torch.allclose(before, wanted) and pipe.get_active_adapters() == ["style"]
