"""QLoRA from the command line: trained, resumed, generated from, merged into each of three bases."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coadapt.core.store import quantised
from coadapt.formats.files import PROVENANCE, read_json
from models import ids

pytest.importorskip("bitsandbytes")

Call = Callable[..., tuple[int, str, str]]
TRAIN = ("--max-steps", 4, "--save-steps", 2, "--eval-steps", 2, "--use-cpu", "--lr", "1e-2")


@pytest.fixture
def trained(call: Call, base: Path, rows: Path, tmp_path: Path) -> Path:
    out = tmp_path / "adapter"
    how = ("--load-in-4bit", "--bnb-4bit-use-double-quant", "--method", "lora", "--r", 4)
    code, _, said = call("train", "--model", base, "--data", rows, *how, *TRAIN, "--output-dir", out)
    assert code == 0, said
    return out


def test_qlora_from_training_to_a_merged_model(call: Call, base: Path, trained: Path, tmp_path: Path) -> None:
    told = read_json(trained / PROVENANCE)["quantisation"]
    assert told == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    code, answer, said = call("generate", "--adapter", trained, "--prompt", "3?", "--use-cpu", "--max-new-tokens", 5)
    assert code == 0, said
    assert "trained on a base with" not in said, "it is quantised as it was"

    outputs = {}
    for into in ("dequantised", "quantised", "original"):
        out = tmp_path / into
        code, text, said = call("merge", "--adapter", trained, "--out", out, "--into", into, "--use-cpu")
        assert code == 0, said
        assert f"Merged into the {into} base: 14 quantised layers." in text
        assert f"lost so ({into}):" in text
        assert "other weights" not in said, "that is what was asked for, and it is measured"
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert bool(list(quantised(merged))) == (into == "quantised")
        outputs[into] = merged
    floats = outputs["dequantised"]
    assert floats.config.to_dict().get("quantization_config") is None
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "dequantised" / "model.safetensors").values())
    code, again, said = call(
        "generate", "--model", tmp_path / "dequantised", "--prompt", "3?", "--use-cpu", "--max-new-tokens", 5
    )
    assert (code, again) == (0, answer), said
    tokens, original = ids(2), AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        moved = (floats(tokens).logits - original(tokens).logits).abs().max()
        off = (outputs["original"](tokens).logits - floats(tokens).logits).abs().max()
    assert moved > off / 10 > 0


@pytest.mark.full
def test_resumed_to_the_same_numbers(call: Call, trained: Path) -> None:
    whole = load_file(trained / "adapter_model.safetensors")
    shutil.rmtree(trained / "checkpoint-4")
    (trained / "adapter_model.safetensors").unlink()
    (trained / "last").unlink(missing_ok=True)
    code, text, said = call("train", "--config", trained / "run.yaml", "--resume")
    assert code == 0, said
    assert "checkpoint-2" in text
    again = load_file(trained / "adapter_model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in whole.items())


@pytest.mark.full
def test_eight_bits(call: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    how = ("--load-in-8bit", "--method", "lora + prompt", "--r", 4)
    code, _, said = call("train", "--model", base, "--data", rows, *how, *TRAIN, "--output-dir", out)
    assert code == 0, said
    code, text, said = call("merge", "--adapter", out, "--adapters", "lora", "--out", tmp_path / "m", "--use-cpu")
    assert code == 0, said
    assert "Merged into the dequantised base" in text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--load-in-4bit", "--load-in-8bit"), "exclude each other"),
        (("--bnb-4bit-quant-type", "fp4"), "bnb_4bit_quant_type has no effect without load_in_4bit"),
        (("--load-in-8bit", "--bnb-4bit-use-double-quant"), "bnb_4bit_use_double_quant has no effect"),
        (("quantization_bit=4",), "load_in_4bit"),
    ],
)
def test_what_cannot_be_meant(call: Call, base: Path, rows: Path, options: tuple[str, ...], why: str) -> None:
    code, _, said = call("train", "--model", base, "--data", rows, *options)
    assert code == 2
    assert why in " ".join(said.split())


@pytest.mark.full
def test_refusals(call: Call, base: Path, rows: Path, trained: Path, tmp_path: Path) -> None:
    code, _, said = call("estimate", "--model", base, "--data", rows, "--load-in-4bit")
    assert code != 0
    assert "estimate does not forecast it" in " ".join(said.split())
    code, _, said = call("export", trained, "--for", "transformers", "--merged", "--out", tmp_path / "x", "--use-cpu")
    assert code != 0
    assert "coadapt merge" in " ".join(said.split())
    assert call("merge", "--adapter", trained, "--out", tmp_path / "q", "--into", "quantised", "--use-cpu")[0] == 0
    code, _, said = call("train", "--model", tmp_path / "q", "--data", rows, "--load-in-4bit")
    assert code != 0
    assert "is quantised already" in " ".join(said.split())
    plain = tmp_path / "plain"
    assert call("train", "--model", base, "--data", rows, "--method", "lora", *TRAIN, "--output-dir", plain)[0] == 0
    code, _, said = call("merge", "--adapter", plain, "--out", tmp_path / "n", "--into", "original", "--use-cpu")
    assert code == 2
    assert "was not quantised" in said
