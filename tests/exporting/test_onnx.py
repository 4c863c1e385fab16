"""ONNX: onnxruntime computes what PyTorch does, at any batch, length and padding; int8 with the error that is told."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from coadapt import BitFitConfig, IA3Config, LoraConfig, PeftModel, export, get_peft_model
from coadapt.exporting import Exported
from models import bert, gpt2, ids, llama, logits, mixtral, picture, t5, vit, whisper
from tests.exporting.conftest import View


def run(file: Path, **inputs: Tensor) -> Tensor:
    opened = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(opened.run(["logits"], {k: v.numpy() for k, v in inputs.items()})[0])


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other.float()).detach().abs().max())


CONFIG = LoraConfig(r=2, init_lora_weights=False)


@pytest.mark.parametrize("make", [gpt2, pytest.param(llama, marks=pytest.mark.full)])
def test_a_language_model_at_any_batch_length_and_padding(view: View, tmp_path: Path, make: Any) -> None:
    made = view(CONFIG, IA3Config(), base=make(), active="a + 0.5*b")
    done = export(made, "onnx", tmp_path / "out", quantise="int8")
    file = tmp_path / "out" / "model.onnx"
    for rows, length in ((1, 1), (2, 9), (5, 3)):
        tokens = ids(rows, length)
        found = run(file, input_ids=tokens, attention_mask=torch.ones_like(tokens))
        assert off(found, logits(made, tokens)) < 1e-5
    padding(made, file)
    eight_bits(done, file)
    generating(made, file)
    assert not any(node.metadata_props for node in onnx.load(file).graph.node)
    assert b"site-packages" not in file.read_bytes()


def padding(made: PeftModel, file: Path) -> None:
    """On either side, it changes nothing of the real tokens."""
    tokens = ids(2, 8)
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[1, 6:] = 0
    found = run(file, input_ids=tokens, attention_mask=mask)
    assert off(found[:1, 3:], logits(made, tokens[:1, 3:])) < 1e-5
    assert off(found[1:, :6], logits(made, tokens[1:, :6])) < 1e-5


def eight_bits(done: Exported, file: Path) -> None:
    """What is told is what the file does."""
    small = file.with_name("model.int8.onnx")
    assert small.stat().st_size < file.stat().st_size
    assert done.facts["int8"]["bytes"] == small.stat().st_size
    assert done.facts["int8"]["seconds_per_call"] > 0
    tokens = ids(4, 20)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    meant = run(file, **inputs)
    assert 0 < float((run(small, **inputs) - meant).norm() / meant.norm()) < 0.2
    assert 0 < done.facts["int8_drift"].share


def generating(made: PeftModel, file: Path) -> None:
    """The loop that docs/export.md shows, which needs no PyTorch, beside `generate`."""
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    code = text.split("<!-- loop -->")[1].split("```python\n")[1].split("```")[0]
    assert "torch" not in code
    scope: dict[str, Any] = {}
    exec(code, scope)
    prompt = ids(1, 4)
    found = scope["answer"](str(file), prompt[0].tolist(), 6, -1)
    meant = made.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found == meant[0, 4:].tolist()


@pytest.mark.full
def test_classifiers_images_and_half_precision(view: View, tmp_path: Path) -> None:
    made = view(CONFIG, base=bert())
    export(made, "onnx", tmp_path / "bert")
    tokens = ids(3, 5)
    found = run(tmp_path / "bert" / "model.onnx", input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert off(found, logits(made, tokens)) < 1e-5
    made.unload()
    made = view(CONFIG, base=vit().bfloat16())
    export(made, "onnx", tmp_path / "vit")
    pixels = picture(ids(3, 4))
    found = run(tmp_path / "vit" / "model.onnx", pixel_values=pixels)
    assert off(found, logits(made, ids(3, 4))) < 0.05
    assert next(made.get_base_model().parameters()).dtype == torch.bfloat16


@pytest.mark.full
def test_an_encoder_decoder(view: View, tmp_path: Path) -> None:
    made = view(CONFIG, base=t5())
    export(made, "onnx", tmp_path / "out")
    tokens = ids(2, 9)
    found = run(
        tmp_path / "out" / "model.onnx",
        input_ids=tokens, attention_mask=torch.ones_like(tokens), decoder_input_ids=tokens[:, :5].contiguous(),
    )  # fmt: skip
    assert off(found, logits(made, tokens)) < 1e-4


@pytest.mark.full
def test_biases_that_the_class_has_no_place_for_are_in_the_graph(view: View, tmp_path: Path) -> None:
    made = view(BitFitConfig(target_modules=["q_proj", "v_proj"]), base=llama())
    export(made, "onnx", tmp_path / "out")
    tokens = ids(2, 5)
    found = run(tmp_path / "out" / "model.onnx", input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert off(found, logits(made, tokens)) < 1e-5
    assert json.loads((tmp_path / "out" / "export.json").read_text())["target"] == "onnx"


def test_models_of_other_inputs_are_refused(tmp_path: Path) -> None:
    made = get_peft_model(whisper(), LoraConfig(r=2))
    with pytest.raises(ValueError, match="takes neither input_ids nor pixel_values"):
        export(made, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_what_torch_cannot_write_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    made = get_peft_model(mixtral(), LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"torch .* cannot write MixtralForCausalLM as ONNX: \w+"):
        export(made, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
