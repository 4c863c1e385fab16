"""AdapterHub's folders, written by its own code (adapterhub/README.md): here they give what they give there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from coadapt import PeftModel
from models import ids

HERE = Path(__file__).parent / "adapterhub"
CLASSES: dict[str, Any] = {
    "bert": BertForSequenceClassification,
    "gpt2": GPT2LMHeadModel,
    "llama": LlamaForCausalLM,
    "t5": T5ForConditionalGeneration,
}
REFUSED = {
    "bert inv": "positions and norms",
    "bert gated": "use_gating",
    "t5 prefix": "relative positions",
}


def _cases() -> list[str]:
    found: list[str] = []
    for model in CLASSES:
        with safe_open(HERE / f"{model}.safetensors", "pt") as file:
            found += [f"{model} {name}" for name in sorted(file.metadata()) if name != "base"]  # in no order
    return found


def unpacked(case: str, to: Path) -> tuple[Any, Tensor]:
    """The base, and the hidden states; the folder is written to `to`."""
    model, name = case.split()
    base: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    with safe_open(HERE / f"{model}.safetensors", "pt") as file:
        said = file.metadata()
        for key in file.keys():
            which, _, inside = key.partition("/")
            if which in ("base", name):
                (base if which == "base" else own)[inside] = file.get_tensor(key)
    (to / "base").mkdir()
    (to / "base" / "config.json").write_text(said["base"])
    save_file(base, to / "base" / "model.safetensors", {"format": "pt"})
    (to / "adapter_config.json").write_text(said[name])
    hidden = own.pop("/hidden")
    save_file(own, to / "adapter.safetensors")
    config = AutoConfig.from_pretrained(to / "base")
    made = CLASSES[model].from_pretrained(to / "base", config=config, attn_implementation="eager")
    return made.eval(), hidden


def hidden_states(model: Any, t5: bool) -> tuple[Tensor, Tensor]:
    tokens = ids(3, 7)
    mask = torch.ones_like(tokens)
    if not t5:
        mask[0, 5:] = 0
    also = {"decoder_input_ids": tokens} if t5 else {}
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, **also)
    return (out.decoder_hidden_states if t5 else out.hidden_states)[-1], mask.bool()


@pytest.mark.filterwarnings("ignore:AdapterHub's files of ReFT")
@pytest.mark.parametrize("case", [case for case in _cases() if case not in REFUSED])
def test_a_folder_gives_what_it_gives_there(case: str, tmp_path: Path) -> None:
    base, expected = unpacked(case, tmp_path)
    before, real = hidden_states(base, "t5" in case)
    view = PeftModel.from_pretrained(base, tmp_path)
    after, _ = hidden_states(view, "t5" in case)
    assert (after - expected)[real].abs().max() <= 2e-6
    assert (expected - before)[real].abs().max() > 1e-2
    view.save_pretrained(tmp_path / "ours")
    base, _ = unpacked_base(case, tmp_path)
    again, _ = hidden_states(PeftModel.from_pretrained(base, tmp_path / "ours"), "t5" in case)
    assert torch.equal(again[real], after[real])


def unpacked_base(case: str, to: Path) -> tuple[Any, None]:
    made = CLASSES[case.split()[0]].from_pretrained(to / "base", attn_implementation="eager")
    return made.eval(), None


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_give_something_else_is_refused(case: str, tmp_path: Path) -> None:
    base, _ = unpacked(case, tmp_path)
    with pytest.raises(ValueError, match=REFUSED[case]):
        PeftModel.from_pretrained(base, tmp_path)


def test_reft_that_may_be_direft_says_so(tmp_path: Path) -> None:
    base, _ = unpacked("bert direft", tmp_path)
    with pytest.warns(UserWarning, match="DiReFT"):
        PeftModel.from_pretrained(base, tmp_path)


def test_tensors_left_over_and_missing_are_named(tmp_path: Path) -> None:
    base, _ = unpacked("llama lora", tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    gone = next(key for key in tensors if key.endswith("lora_B"))
    save_file({k: t for k, t in tensors.items() if k != gone}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"lora_B is missing"):
        PeftModel.from_pretrained(base, tmp_path)
    path = "model.layers.0.self_attn.q_proj.loras.a_lora.lora_C"
    save_file({**tensors, path: torch.ones(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="lora_C"):
        PeftModel.from_pretrained(base, tmp_path)


def test_other_methods_and_pickles_are_refused(tmp_path: Path) -> None:
    base, _ = unpacked("llama lora", tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    said["config"]["architecture"] = "prompt_tuning"
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="prompt_tuning"):
        PeftModel.from_pretrained(base, tmp_path)
    (tmp_path / "adapter.safetensors").rename(tmp_path / "pytorch_adapter.bin")
    with pytest.raises(ValueError, match="pickle"):
        PeftModel.from_pretrained(base, tmp_path)
