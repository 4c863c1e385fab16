"""P8, P9, P10, P14, P20: what is saved, refused and merged."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cases import CASES
from coadapt import LoraConfig, PeftModel, get_peft_model
from models import bert, gpt2, ids, llama, logits, stir, t5
from steps import error, flat

NAMES = ["self_attn", "weight", "lora", "lora_A", "q", "mlp", "foo", "foobar", "adapters", "base", "a.b", "default"]


@pytest.mark.parametrize("name", NAMES)
def test_p8_names_that_look_like_keys(make: Callable[..., Any], name: str, tmp_path: Path) -> None:
    """Saved together and the other one alone, an adapter of any name comes back as it was."""
    view = get_peft_model(make(), CASES["lora"], adapter_name=name)
    view.add_adapter("other", CASES["lora"])
    stir(view.adapters)
    view.save_pretrained(tmp_path / "both")
    view.save_pretrained(tmp_path / "other", selected_adapters=["other"])
    view.save_pretrained(tmp_path / "named", selected_adapters=[name])
    again = PeftModel.from_pretrained(make(), tmp_path / "both")
    for key in (name, "other"):
        assert torch.equal(again.get_adapter(key).weight, view.get_adapter(key).weight)
    for folder, key in ((tmp_path / "other", "other"), (tmp_path / "named", name)):
        single = PeftModel.from_pretrained(make(), folder)
        assert torch.equal(logits(single), logits(view.eval(), adapters=key))
    stored = load_file(tmp_path / "other" / "other" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == view.get_adapter("other").weight.numel()


LAYERS = {llama: "num_hidden_layers", gpt2: "n_layer", t5: "num_layers", bert: "num_hidden_layers"}


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix"])
def test_p9_fewer_layers_is_an_error(make: Callable[..., Any], method: str, tmp_path: Path) -> None:
    get_peft_model(make(), CASES[method]).save_pretrained(tmp_path)
    small = make(**{LAYERS[make]: 1})
    with (
        pytest.warns(UserWarning, match="fingerprint"),
        pytest.raises(ValueError, match=r"num_layers=2 does not fit|not in this adapter"),
    ):
        PeftModel.from_pretrained(small, tmp_path)
    assert {type(m) for m in small.modules()} == {type(m) for m in make().modules()}


def test_p9_every_misfit_is_listed(make: Callable[..., Any], tmp_path: Path) -> None:
    get_peft_model(make(), CASES["lora"]).save_pretrained(tmp_path)
    lost = sorted(
        k
        for k in load_file(tmp_path / "adapter_model.safetensors")
        if re.search(r"(layers|h|block|encoder\.layer)\.1\.", k)
    )
    assert lost
    with pytest.warns(UserWarning), pytest.raises(ValueError) as caught:
        PeftModel.from_pretrained(make(**{LAYERS[make]: 1}), tmp_path)
    assert [key for key in lost if key not in str(caught.value)] == []


def test_p9_other_base_of_equal_shape_warns(make: Callable[..., Any], tmp_path: Path) -> None:
    get_peft_model(make(), CASES["lora"]).save_pretrained(tmp_path / "one")
    other = make()
    stir(other)
    with pytest.warns(UserWarning, match="other weights") as caught:
        again = PeftModel.from_pretrained(other, tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    said = [
        json.loads((tmp_path / f / "provenance.json").read_text("utf-8"))["base"]["fingerprint"] for f in ("one", "two")
    ]
    assert said[0] != said[1]
    assert all(fingerprint in str(caught[0].message) for fingerprint in said)


def test_p9_equal_base_does_not_warn(make: Callable[..., Any], tmp_path: Path) -> None:
    """Warnings are errors here; a base in bf16 is the same base."""
    get_peft_model(make(), CASES["lora"]).save_pretrained(tmp_path)
    PeftModel.from_pretrained(make(), tmp_path)
    PeftModel.from_pretrained(make().to(torch.bfloat16), tmp_path)


TYPOS = {llama: ("q_proj", "q_porj"), gpt2: ("c_attn", "c_atn"), t5: ("wo", "SelfAtention"), bert: ("query", "qeury")}
NEAREST = {llama: "q_proj", gpt2: "c_attn", t5: "SelfAttention", bert: "query"}


def test_p10_a_typo_beside_a_right_name(make: Callable[..., Any]) -> None:
    right, wrong = TYPOS[make]
    base = make()
    with pytest.raises(ValueError, match=rf"{wrong}.*nearest.*{NEAREST[make]}"):
        get_peft_model(base, LoraConfig(target_modules=[right, wrong]))
    assert torch.equal(logits(base), logits(make()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_p14_unmerge_to_the_bit(make: Callable[..., Any], dtype: torch.dtype) -> None:
    base = make().to(dtype)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    view = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    stir(view.adapters)
    adapted, plain = logits(view), logits(base)
    for _ in range(3):
        view.merge_adapter()
        assert any(not torch.equal(v, before[k]) for k, v in base.state_dict().items())
        assert error(logits(view).float(), adapted.float()) < (0.05 if dtype is torch.bfloat16 else 1e-5)
        view.unmerge_adapter()
        after = base.state_dict()
        assert [k for k in before if not torch.equal(after[k], before[k])] == []
    assert torch.equal(logits(view), adapted)
    assert torch.equal(logits(base), plain)


TIED = {
    "gpt2": (gpt2, "wte"),
    "gpt2-head": (gpt2, "lm_head"),
    "llama": (llama, "embed_tokens"),
    "t5": (t5, "embed_tokens"),
    "t5-head": (t5, "lm_head"),
}


@pytest.mark.parametrize("which", TIED)
def test_p20_tied_embeddings_merge_save_reload(which: str, tmp_path: Path) -> None:
    make, target = TIED[which]
    base = make(tie_word_embeddings=True)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    view = get_peft_model(base, LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
    stir(view.adapters)
    adapted = logits(view)
    assert error(logits(make(tie_word_embeddings=True)), adapted) > 1e-3
    merged = view.merge_and_unload()
    assert error(logits(merged), adapted) < 1e-5
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again.requires_grad_(False)), logits(merged.requires_grad_(False)))


def test_p20_unmerge_ties_again() -> None:
    base = gpt2()
    view = get_peft_model(base, LoraConfig(r=4, target_modules=["wte"], init_lora_weights=False))
    view.merge_adapter()
    assert base.transformer.wte.weight is not base.lm_head.weight
    view.unmerge_adapter()
    assert base.transformer.wte.weight is base.lm_head.weight
    assert torch.equal(flat(base.parameters()), flat(gpt2().parameters()))


def test_p8_a_copied_folder_is_the_same_adapter(tmp_path: Path) -> None:
    """Nothing in a folder depends on where it lies."""
    view = get_peft_model(llama(), CASES["lora"])
    view.save_pretrained(tmp_path / "one")
    shutil.move(tmp_path / "one", tmp_path / "two")
    again = PeftModel.from_pretrained(llama(), tmp_path / "two", adapter_name="renamed")
    assert torch.equal(logits(again, ids(2)), logits(view, ids(2)))
