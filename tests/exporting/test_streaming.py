"""Merging tensor by tensor writes the very files that merging in memory writes, and holds one tensor at a time."""

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from cases import CASES as METHOD_CASES
from coadapt import BitFitConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.config import PeftConfig
from coadapt.core.method import METHODS, WeightMethod
from coadapt.exporting import streaming
from coadapt.exporting.streaming import merge_to
from laws.setting import MAKE, config_of, fits
from models import gpt2, llama, mixtral, stir, t5

CASES: dict[str, tuple[Callable[..., Any], PeftConfig]] = {
    "llama": (llama, LoraConfig(r=4)),
    "llama all": (llama, LoraConfig(r=4, target_modules="all-linear")),
    "llama dora": (llama, LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "embed_tokens"])),
    "llama new biases": (llama, BitFitConfig(target_modules=["q_proj", "down_proj"])),
    "gpt2 tokens": (gpt2, LoraConfig(r=4, trainable_token_indices=[3, 7])),
    "llama copy": (llama, LoraConfig(r=4, modules_to_save=["lm_head", "norm"])),
    "gpt2": (gpt2, LoraConfig(r=4, target_modules=["c_attn", "c_fc"])),
    "gpt2 biases": (gpt2, LoraConfig(r=4, target_modules=["c_attn"], bias="all")),
    "gpt2 ia3": (gpt2, IA3Config()),
    "gpt2 tied": (gpt2, LoraConfig(r=4, target_modules=["c_attn", "wte"])),
    "gpt2 head": (gpt2, LoraConfig(r=4, target_modules=["lm_head"])),
    "t5": (t5, LoraConfig(r=4, target_modules="all-linear")),
    "t5 tied": (t5, LoraConfig(r=4, target_modules=["q", "embed_tokens"])),
    "mixtral": (mixtral, LoraConfig(r=4)),
    "mixtral experts": (
        mixtral,
        LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    ),
    "mixtral rotated experts": (
        mixtral,
        OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["experts", "router"]),
    ),
}


def offloaded(model: Any, folder: Path, aside: Path) -> Any:
    """The saved base with its weights left on disk."""
    return type(model).from_pretrained(folder, dtype="auto", device_map={"": "disk"}, offload_folder=aside)


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}
    return found


def both(
    made: Callable[..., Any], config: PeftConfig, tmp_path: Path, size: str = "20KB", dtype: torch.dtype | None = None
) -> tuple[Path, Path]:
    """Merged in memory, and as a stream."""
    model = made().to(dtype or torch.float32)
    model.save_pretrained(tmp_path / "base", max_shard_size=size)
    view = get_peft_model(type(model).from_pretrained(tmp_path / "base", dtype="auto"), config)
    stir(view.adapters)
    view.save_pretrained(tmp_path / "adapter")
    view = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base", dtype="auto"), tmp_path / "adapter")
    view.merge_and_unload().save_pretrained(tmp_path / "memory", max_shard_size=size)
    stream = tmp_path / "stream"
    stream.mkdir()
    merge_to(
        PeftModel.from_pretrained(offloaded(model, tmp_path / "base", tmp_path / "off"), tmp_path / "adapter"),
        stream,
        size,
    )
    return tmp_path / "memory", stream


@pytest.mark.filterwarnings("ignore:.*layers that had no bias")
@pytest.mark.parametrize("case", CASES)
def test_a_stream_writes_what_merging_in_memory_writes(case: str, tmp_path: Path) -> None:
    memory, stream = both(*CASES[case], tmp_path)
    a, b, base = tensors(memory), tensors(stream), tensors(tmp_path / "base")
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
    assert any(key not in base or not torch.equal(a[key], base[key]) for key in a)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((memory / name).read_text()) == json.loads((stream / name).read_text())
    if "mixtral" not in case:  # in memory its experts lie in one storage, and so in one file
        for file in memory.iterdir():
            assert file.read_bytes() == (stream / file.name).read_bytes(), file.name
    assert len(list(stream.glob("*.safetensors"))) > 1


def _of_weights() -> list[str]:
    return [c for c in METHOD_CASES if issubclass(METHODS[METHOD_CASES[c].method], WeightMethod)]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*layers that had no bias")
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("case", _of_weights())
def test_every_method_of_weights_is_streamed(case: str, model: str, tmp_path: Path) -> None:
    if not fits(case, model):
        pytest.skip("no place there")
    try:
        memory, stream = both(MAKE[model], config_of(case, model), tmp_path)
    except TypeError as refused:
        assert "no map of weights" in str(refused)
        return
    for file in memory.iterdir():
        assert file.read_bytes() == (stream / file.name).read_bytes(), file.name


def test_half_precision_is_kept(tmp_path: Path) -> None:
    memory, stream = both(llama, LoraConfig(r=4, modules_to_save=["lm_head"]), tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in tensors(stream).values()} == {torch.bfloat16}
    for file in memory.iterdir():
        assert file.read_bytes() == (stream / file.name).read_bytes(), file.name


@pytest.mark.full
def test_no_two_weights_of_the_base_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another count: all tensors that Python knows of, whenever one is read or written."""
    model = llama(num_hidden_layers=6)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    view = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    stir(view.adapters)
    view.save_pretrained(tmp_path / "adapter")
    total, largest = (f(p.numel() * 4 for p in model.parameters()) for f in (sum, max))
    loaded = PeftModel.from_pretrained(offloaded(model, tmp_path / "base", tmp_path / "off"), tmp_path / "adapter")
    del model, view
    before, peak = _living(), 0

    def watched(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal peak
            found = own(*args)
            peak = max(peak, _living() - before)
            return found

        return call

    monkeypatch.setattr(streaming, "value", watched(streaming.value))
    monkeypatch.setattr(streaming._File, "write", watched(streaming._File.write))
    (tmp_path / "out").mkdir()
    assert merge_to(loaded, tmp_path / "out", "30KB") == largest
    assert largest <= peak <= 3 * largest < total / 4


def _living() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and not o.is_meta]
    return sum({o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in found}.values())


def test_what_is_no_change_of_weights_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2)).save_pretrained(tmp_path / "adapter")
    base = offloaded(model, tmp_path / "base", tmp_path / "off")
    with pytest.raises(TypeError, match="prompt"):
        merge_to(PeftModel.from_pretrained(base, tmp_path / "adapter"), tmp_path)


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    view = get_peft_model(model, LoraConfig(r=2))
    next(view.adapters.parameters()).data.fill_(float("inf"))
    stir(view.adapters)
    view.save_pretrained(tmp_path / "adapter")
    base = offloaded(model, tmp_path / "base", tmp_path / "off")
    with pytest.raises(ValueError, match="not finite"):
        merge_to(PeftModel.from_pretrained(base, tmp_path / "adapter"), tmp_path)
