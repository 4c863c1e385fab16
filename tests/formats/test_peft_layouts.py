"""What differs between the field's layouts and ours is read as it is, kept, and told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import coadapt
from coadapt import PeftModel, get_peft_model
from models import MODELS, logits, stir

from .field import CLASSES, SEQ2SEQ, Case, far, field_loaded, field_logits, field_quietly, field_stirred, other

# ---- T5's prefix -----------------------------------------------------------------------------------------------------

FIELD_T5 = Case("t5", "PrefixTuningConfig", {"num_virtual_tokens": 3, **SEQ2SEQ}, theirs={"token_dim": 24})


@pytest.mark.parametrize("layers", [2, 3])
def test_t5_prefix_in_the_fields_layout(layers: int, tmp_path: Path) -> None:
    base = lambda: MODELS["t5"](num_layers=layers)  # noqa: E731
    view = get_peft_model(base(), coadapt.PrefixTuningConfig(num_virtual_tokens=3, prefix_layout="peft", **SEQ2SEQ))
    stir(view.adapters)
    expected = logits(view.eval())
    view.save_pretrained(tmp_path)
    assert "readable_by_peft" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert far(field_logits(field_loaded(base(), tmp_path)), expected) < 1e-5
    assert far(logits(PeftModel.from_pretrained(base(), tmp_path)), expected) == 0


def test_a_prompt_on_an_encoder(tmp_path: Path) -> None:
    """The field's BERT pools its first position, which is a virtual token; ours, by default, the first real one."""
    config = coadapt.PromptTuningConfig(num_virtual_tokens=3, output_virtual_tokens=True, **CLASSES)
    view = get_peft_model(MODELS["bert"](), config)
    stir(view.adapters)
    expected = logits(view.eval())
    view.save_pretrained(tmp_path / "ours")
    assert far(field_logits(field_loaded(MODELS["bert"](), tmp_path / "ours")), expected) < 1e-5
    field_quietly(lambda: field_loaded(MODELS["bert"](), tmp_path / "ours").save_pretrained(tmp_path / "field"))
    again = PeftModel.from_pretrained(MODELS["bert"](), tmp_path / "field")
    assert far(logits(again), expected) < 1e-5
    assert again.peft_config["default"].output_virtual_tokens


def test_t5_prefix_of_the_field_is_read_as_it_is_and_kept(tmp_path: Path) -> None:
    model = field_stirred(FIELD_T5)
    expected = field_logits(model)
    field_quietly(lambda: model.save_pretrained(tmp_path / "field"))
    view = PeftModel.from_pretrained(FIELD_T5.base(), tmp_path / "field")
    assert far(logits(view), expected) < 1e-5
    assert view.peft_config["default"].prefix_layout == "peft"
    view.save_pretrained(tmp_path / "again")
    assert far(field_logits(field_loaded(FIELD_T5.base(), tmp_path / "again")), expected) < 1e-5
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("field", "again"))
    assert torch.equal(before["prompt_embeddings"], after["prompt_embeddings"])


@pytest.mark.parametrize("options", [{}, {"prefix_sites": ["decoder"]}, {"prefix_projection": True}])
def test_t5_prefix_in_our_layout_says_that_the_field_cannot_read_it(options: dict[str, Any], tmp_path: Path) -> None:
    view = get_peft_model(MODELS["t5"](), coadapt.PrefixTuningConfig(num_virtual_tokens=3, **SEQ2SEQ, **options))
    stir(view.adapters)
    expected = logits(view.eval())
    view.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["readable_by_peft"] is False and said["prefix_layout"] == "own"
    assert "prompt_embeddings" not in load_file(tmp_path / "adapter_model.safetensors")
    assert far(logits(PeftModel.from_pretrained(MODELS["t5"](), tmp_path)), expected) < 1e-6


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("t5", coadapt.PromptTuningConfig(num_virtual_tokens=3, prompt_sites=["decoder"])),
        ("bert", coadapt.PromptTuningConfig(num_virtual_tokens=3, **CLASSES)),
        ("gpt2", coadapt.PrefixTuningConfig(num_virtual_tokens=3, position_offset=0)),
        ("llama", coadapt.PrefixTuningConfig(num_virtual_tokens=3, prefix_type="decoupled")),
        ("llama", coadapt.BottleneckConfig(bottleneck_size=4)),
        ("gpt2", coadapt.BitFitConfig()),
    ],
)
def test_what_the_field_would_get_wrong_says_so(model: str, config: Any, tmp_path: Path) -> None:
    view = get_peft_model(MODELS[model](), config)
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["readable_by_peft"] is False
    again = PeftModel.from_pretrained(MODELS[model](), tmp_path)
    assert far(logits(again), logits(view.eval())) < 1e-6


def test_oft_at_convolutions_is_what_the_field_merges(tmp_path: Path) -> None:
    """W' = W R^T, as in the paper. Before a merge the field rotates patches and adds up where they overlap."""
    case = other("conv", "OFTConfig", oft_block_size=9, target_modules=["first", "second"])
    model = field_stirred(case)
    field_quietly(lambda: model.save_pretrained(tmp_path / "field"))
    before = field_logits(model)
    merged = logits(field_quietly(model.merge_and_unload))
    view = PeftModel.from_pretrained(case.base(), tmp_path / "field")
    assert far(logits(view), merged) < 1e-5 < 1e-3 < far(before, merged)
    view.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["readable_by_peft"] is False
