"""Folders that cannot be loaded: one clear error each, with everything that does not fit."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cases import CASES
from coadapt import (
    BottleneckConfig,
    PeftModel,
    get_peft_model,
)
from models import gpt2, llama
from steps import traces


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder, for the tests to spoil."""
    get_peft_model(llama(), CASES["lora"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load_fails(folder: Path, kind: type[Exception], *parts: str, make: Any = llama) -> None:
    """Both ways of loading refuse it and leave base and view as they were."""
    base = make()
    before = traces(base)
    with pytest.raises(kind) as caught:
        PeftModel.from_pretrained(base, folder)
    assert [p for p in parts if p not in str(caught.value)] == [], str(caught.value)
    assert traces(base) == before
    view = get_peft_model(base, BottleneckConfig(bottleneck_size=3), adapter_name="there")
    with pytest.raises(kind):
        view.load_adapter(folder, "new")
    assert list(view.peft_config) == ["there"]


def test_folders_that_are_no_adapter(folder: Path, tmp_path: Path) -> None:
    load_fails(tmp_path / "nowhere", FileNotFoundError, "nowhere", "adapter_config.json")
    (tmp_path / "empty").mkdir()
    load_fails(tmp_path / "empty", FileNotFoundError, "adapter_config.json", "nothing")
    llama().save_pretrained(tmp_path / "model")
    load_fails(tmp_path / "model", ValueError, "model.safetensors", "not the adapters")
    load_fails(tmp_path, FileNotFoundError, "adapter_config.json", "sub-folders adapter")
    (folder / "adapter_model.safetensors").unlink()
    load_fails(folder, FileNotFoundError, "adapter_model.safetensors", "missing")


def test_a_damaged_file(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    load_fails(folder, ValueError, "adapter_model.safetensors", "damaged")
    (folder / "adapter_config.json").write_text("{", "utf-8")
    load_fails(folder, ValueError, "adapter_config.json", "valid JSON")


def test_a_pickle(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    load_fails(folder, ValueError, "pickle", "adapter_model.bin", "adapter_model.safetensors")
    with pytest.raises(ValueError, match="pickle"):
        get_peft_model(llama(), CASES["lora"]).save_pretrained(folder, safe_serialization=False)


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(dict(change(load_file(file))), file)


def test_all_misfits_are_listed_at_once(folder: Path) -> None:
    """A key that is missing, one left over, one of another shape: three lines in one message."""
    root = "base_model.model.model.layers"
    gone, wide = f"{root}.0.self_attn.q_proj.lora_A.weight", f"{root}.1.self_attn.v_proj.lora_B.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"{root}.9.self_attn.q_proj.lora_A.weight"] = tensors.pop(gone)
        return {**tensors, wide: torch.zeros(17, 4)}

    rewritten(folder, spoil)
    load_fails(
        folder, ValueError, "3 of its tensors", f"{gone}: not in the file",
        f"{root}.9.self_attn.q_proj.lora_A.weight: not in this adapter",
        f"{wide}: (17, 4) in the file, (16, 4) in this model",
    )  # fmt: skip


def test_another_base(folder: Path) -> None:
    said = json.loads((folder / "provenance.json").read_text("utf-8"))["base"]
    wide = [
        f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{m}.weight"
        for i in (0, 1)
        for p, m in ("qA", "qB", "vA")
    ]
    with pytest.warns(UserWarning, match=f"fingerprint is {said['fingerprint']}, this model's is [0-9a-f-]+"):
        load_fails(
            folder,
            ValueError,
            *wide,
            "(4, 32) in the file, (4, 64) in this model",
            make=lambda: llama(hidden_size=64, head_dim=16),
        )
    with pytest.warns(UserWarning):
        load_fails(folder, ValueError, "q_proj", make=gpt2)


def test_fields_that_are_not_read(folder: Path) -> None:
    """A configuration of another program that would give other results here."""
    file = folder / "adapter_config.json"
    said = json.loads(file.read_text("utf-8"))
    for change, parts in (
        ({"peft_type": "LORB"}, ("'LORB'", "LORA")),
        ({"some_option": 3}, ("some_option=3",)),
    ):
        file.write_text(json.dumps(said | change), "utf-8")
        load_fails(folder, ValueError, *parts)


def test_compositions_that_are_incomplete(tmp_path: Path) -> None:
    view = get_peft_model(llama(), CASES["lora"], adapter_name="a")
    view.add_adapter("b", CASES["prompt"])
    view.set_adapter("a + b")
    view.save_pretrained(tmp_path)
    base = llama()
    before = traces(base)
    with pytest.raises(ValueError, match=r"adapters a, b; 'c' is not among them"):
        PeftModel.from_pretrained(base, tmp_path, adapter_name="c")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"b holds no adapter: adapter_config.json"):
        PeftModel.from_pretrained(base, tmp_path)
    assert traces(base) == before
