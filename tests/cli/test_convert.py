"""`coadapt convert`: what it writes is what the next verb reads."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

Call = Callable[..., tuple[int, str, str]]


def test_a_file_becomes_a_folder_and_a_pickle_needs_a_word(call: Call, tmp_path: Path) -> None:
    tensors = {"lora_te_q_proj.lora_down.weight": torch.ones(2, 4), "lora_te_q_proj.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    code, said, _ = call("convert", tmp_path / "in.safetensors", tmp_path / "out", "--to", "peft")
    assert code == 0 and "1 layers of kohya's form" in said
    assert (tmp_path / "out" / "text_encoder" / "adapter_config.json").is_file()
    torch.save(tensors, tmp_path / "in.pt")
    code, _, error = call("convert", tmp_path / "in.pt", tmp_path / "new", "--to", "peft")
    assert code == 2 and "--trust-pickle" in error and not (tmp_path / "new").exists()
    trusted = ("--trust-pickle", tmp_path / "in.pt")
    assert call("convert", tmp_path / "in.pt", tmp_path / "new", "--to", "peft", *trusted)[0] == 0
    assert call("convert", tmp_path / "in.pt", tmp_path / "new", "--to", "peft", *trusted)[0] == 2
