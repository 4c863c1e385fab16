"""Files of loralib, kohya, LyCORIS and diffusers: what they say of a weight is what is read, and what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coadapt import LoraConfig, PeftModel, get_peft_model
from coadapt.formats.foreign.converting import Options, convert
from coadapt.formats.foreign.kohya import path_of
from models import gpt2, llama, stir


class Attention(nn.Module):
    """Named as in diffusers' UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(12, 12), nn.Linear(12, 12)
        self.to_out = nn.ModuleList([nn.Linear(12, 12)])


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attentions": nn.ModuleList([Attention()])})])
        self.conv_in = nn.Conv2d(4, 6, 3)
        self.time_emb_proj = nn.Linear(8, 6)


QUERY, CONV = "down_blocks.0.attentions.0.to_q", "conv_in"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def merged(folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(Unet(), folder).merge_and_unload()


def change(folder: Path, path: str) -> Tensor:
    before, after = Unet().get_submodule(path), merged(folder).get_submodule(path)
    return after.weight.detach() - before.weight.detach()  # type: ignore[operator]


def kohya_lora() -> dict[str, Tensor]:
    return {
        "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight": random(3, 12),
        "lora_unet_down_blocks_0_attentions_0_to_q.lora_up.weight": random(12, 3),
        "lora_unet_down_blocks_0_attentions_0_to_q.alpha": torch.tensor(1.5),
        "lora_unet_conv_in.lora_down.weight": random(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": random(6, 2, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(2.0),
    }


def test_kohyas_lora_is_read_by_its_formula(tmp_path: Path) -> None:
    own = kohya_lora()
    save_file(own, tmp_path / "in.safetensors")
    done = convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    assert (done.form, done.layers) == ("kohya", 2)
    name = "lora_unet_down_blocks_0_attentions_0_to_q"
    product = own[f"{name}.lora_up.weight"] @ own[f"{name}.lora_down.weight"] * 1.5 / 3
    torch.testing.assert_close(change(tmp_path / "out" / "unet", QUERY), product, atol=1e-5, rtol=1e-5)
    up, down = own["lora_unet_conv_in.lora_up.weight"].flatten(1), own["lora_unet_conv_in.lora_down.weight"].flatten(1)
    torch.testing.assert_close(
        change(tmp_path / "out" / "unet", CONV), (up @ down).view(6, 4, 3, 3), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("through", ["peft", "diffusers"])
def test_kohyas_lora_comes_back(through: Any, tmp_path: Path) -> None:
    own = kohya_lora()
    save_file(own, tmp_path / "in.safetensors")
    middle = tmp_path / ("out" if through == "peft" else "out.safetensors")
    convert(tmp_path / "in.safetensors", middle, through)
    convert(middle, tmp_path / "back.safetensors", "kohya")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == own.keys()
    for name in {key.partition(".")[0] for key in own}:
        products = [
            t[f"{name}.lora_up.weight"].flatten(1)
            @ t[f"{name}.lora_down.weight"].flatten(1)
            * t[f"{name}.alpha"]
            / len(t[f"{name}.lora_down.weight"])
            for t in (own, back)
        ]
        torch.testing.assert_close(*products)
    if through == "peft":
        assert all(torch.equal(own[key], back[key]) for key in own)


def test_lycoris_loha_is_read_by_its_formula(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_to_q"
    parts = {"hada_w1_a": (12, 3), "hada_w1_b": (3, 12), "hada_w2_a": (12, 3), "hada_w2_b": (3, 12)}
    own = {f"{name}.{part}": random(*shape, seed=i) for i, (part, shape) in enumerate(parts.items())}
    save_file({**own, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    a1, b1, a2, b2 = own.values()
    expected = (a1 @ b1) * (a2 @ b2) * 2 / 3
    torch.testing.assert_close(change(tmp_path / "out" / "unet", QUERY), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="LOHA"):
        convert(tmp_path / "in.safetensors", tmp_path / "d.safetensors", "diffusers")
    convert(tmp_path / "out", tmp_path / "back.safetensors", "kohya")
    assert all(torch.equal(load_file(tmp_path / "back.safetensors")[key], value) for key, value in own.items())


@pytest.mark.parametrize("whole", [True, False])
def test_lycoris_lokr_is_read_by_its_formula(whole: bool, tmp_path: Path) -> None:
    """Whole matrices have a scale of 1, whatever alpha says; else it is alpha / r."""
    name = "lora_unet_down_blocks_0_attentions_0_to_q"
    own = {f"{name}.lokr_w1": random(3, 3), f"{name}.alpha": torch.tensor(0.5)}
    second = random(4, 4) if whole else random(4, 1) @ random(1, 4, seed=2)
    if whole:
        own[f"{name}.lokr_w2"] = second
    else:
        own |= {f"{name}.lokr_w2_a": random(4, 1), f"{name}.lokr_w2_b": random(1, 4, seed=2)}
    save_file(own, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    expected = torch.kron(own[f"{name}.lokr_w1"], second) * (1 if whole else 0.5)
    torch.testing.assert_close(change(tmp_path / "out" / "unet", QUERY), expected, atol=1e-5, rtol=1e-5)


def test_diffusers_older_names_are_read(tmp_path: Path) -> None:
    a, b = random(2, 12), random(12, 2)
    start = "unet.down_blocks.0.attentions.0"
    older = {
        f"{start}.processor.to_q_lora.down.weight": a,
        f"{start}.processor.to_q_lora.up.weight": b,
        f"{start}.processor.to_out_lora.down.weight": a,
        f"{start}.processor.to_out_lora.up.weight": b,
        "text_encoder.text_model.q_proj.lora_linear_layer.down.weight": a,
        "text_encoder.text_model.q_proj.lora_linear_layer.up.weight": b,
    }
    save_file({key: tensor.clone() for key, tensor in older.items()}, tmp_path / "in.safetensors")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    for path in (QUERY, "down_blocks.0.attentions.0.to_out.0"):
        torch.testing.assert_close(change(tmp_path / "out" / "unet", path), b @ a, atol=1e-5, rtol=1e-5)
    convert(tmp_path / "out", tmp_path / "new.safetensors", "diffusers")
    assert sorted(load_file(tmp_path / "new.safetensors")) == sorted(
        f"{path}.lora_{half}.weight"
        for path in (f"{start}.to_q", f"{start}.to_out.0", "text_encoder.text_model.q_proj")
        for half in "AB"
    )


def test_diffusers_own_configuration_is_read(tmp_path: Path) -> None:
    told = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"conv_in": 1}}
    tensors = {f"unet.{QUERY}.lora_A.weight": random(2, 12), f"unet.{QUERY}.lora_B.weight": random(12, 2)}
    save_file(tensors, tmp_path / "in.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    expected = 3 * tensors[f"unet.{QUERY}.lora_B.weight"] @ tensors[f"unet.{QUERY}.lora_A.weight"]
    torch.testing.assert_close(change(tmp_path / "out" / "unet", QUERY), expected, atol=1e-5, rtol=1e-5)


def test_loralib_beside_the_bases_weights(tmp_path: Path) -> None:
    model = llama()
    path = "model.layers.0.self_attn.q_proj"
    a, b = random(2, 32), random(32, 2)
    save_file({**model.state_dict(), f"{path}.lora_A": a, f"{path}.lora_B": b}, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match="--alpha"):
        convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", Options(alpha=8))
    after = PeftModel.from_pretrained(llama(), tmp_path / "out").merge_and_unload().get_submodule(path)
    torch.testing.assert_close(after.weight - model.get_submodule(path).weight, 4 * b @ a, atol=1e-5, rtol=1e-5)
    convert(tmp_path / "out", tmp_path / "back.safetensors", "loralib")
    back = load_file(tmp_path / "back.safetensors")
    torch.testing.assert_close(back[f"{path}.lora_B"], 4 * b)


def test_loralibs_merged_layers(tmp_path: Path) -> None:
    """Queries and values of GPT-2's c_attn, as in loralib's own example: a grouped convolution of A by B."""
    path = "transformer.h.0.attn.c_attn"
    a, b = random(4, 32), random(64, 2)
    save_file({f"{path}.lora_A": a, f"{path}.lora_B": b}, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match="--enable"):
        convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", Options(alpha=4))
    convert(tmp_path / "in.safetensors", tmp_path / "out", "peft", Options(alpha=4, enable=[True, False, True]))
    grouped = nn.functional.conv1d(a[None], b[..., None], groups=2)[0] * 4 / 2
    expected = torch.cat([grouped[:32], torch.zeros(32, 32), grouped[32:]])
    after = PeftModel.from_pretrained(gpt2(), tmp_path / "out").merge_and_unload().get_submodule(path)
    before = gpt2().get_submodule(path)
    torch.testing.assert_close((after.weight - before.weight).mT, expected, atol=1e-5, rtol=1e-5)


def test_a_folder_of_ours_becomes_a_file(tmp_path: Path) -> None:
    view = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, rank_pattern={"q_proj": 2}, use_rslora=True))
    stir(view.adapters)
    view.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "mid.safetensors", "kohya")
    convert(tmp_path / "mid.safetensors", tmp_path / "out", "peft")
    tokens = torch.arange(3, 10)[None]
    again = PeftModel.from_pretrained(llama(), tmp_path / "out")
    torch.testing.assert_close(again(tokens).logits, view(tokens).logits, atol=1e-5, rtol=1e-5)


def test_names_with_underscores() -> None:
    paths = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "up_blocks.3.resnets.2.time_emb_proj",
        "mid_block.resnets.0.conv_shortcut",
        "text_model.encoder.layers.11.self_attn.out_proj",
        "text_model.encoder.layers.11.mlp.fc1",
        "down_blocks.0.downsamplers.0.conv",
        "time_embedding.linear_1",
        "transformer_blocks.3.ff.net.0.proj",
    ]
    assert [path_of(path.replace(".", "_"), None) for path in paths] == paths
    assert path_of("odd_name_0", {"odd_name_0": "odd_name.0"}) == "odd_name.0"


def test_pickles_are_read_only_where_they_are_named(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    torch.save({f"{path}.lora_A": random(2, 32), f"{path}.lora_B": random(32, 2)}, tmp_path / "in.pt")
    with pytest.raises(ValueError, match="--trust-pickle"):
        convert(tmp_path / "in.pt", tmp_path / "out", "peft", Options(alpha=4))
    with pytest.raises(ValueError, match="--trust-pickle"):
        convert(tmp_path / "in.pt", tmp_path / "out", "peft", Options(alpha=4, trusted=tmp_path / "other.pt"))
    convert(tmp_path / "in.pt", tmp_path / "out", "peft", Options(alpha=4, trusted=tmp_path / "in.pt"))
    convert(tmp_path / "in.pt", tmp_path / "st.safetensors", "safetensors", Options(trusted=tmp_path / "in.pt"))
    assert sorted(load_file(tmp_path / "st.safetensors")) == [f"{path}.lora_A", f"{path}.lora_B"]
    torch.save({"lora": Path}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        convert(tmp_path / "code.pt", tmp_path / "o", "peft", Options(trusted=tmp_path / "code.pt"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_conv_in.oft_blocks": torch.ones(1)}, "oft_blocks"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4)}, "lora_B.weight is missing"),
        ({"lora_unet_conv_in.lora_mid.weight": torch.ones(1, 4)}, "lora_mid"),
        ({"unet.conv_in.weight": torch.ones(1)}, "unet.conv_in.weight|conv_in.weight"),
        ({"weight": torch.ones(1)}, "no form that is known"),
    ],
)
def test_what_is_not_read_is_named(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "in.safetensors", tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    save_file(kohya_lora(), tmp_path / "in.safetensors")
    with pytest.raises(FileExistsError):
        convert(tmp_path / "in.safetensors", tmp_path / "in.safetensors", "diffusers")
