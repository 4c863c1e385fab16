"""Adapters for vLLM, TGI, peft, Ollama, MLX: read as those read them, they compute what coadapt does."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from coadapt import (
    BitFitConfig,
    BottleneckConfig,
    FullCopyConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    export,
)
from models import gpt2, ids, llama, logits
from tests.exporting.conftest import View, patterned

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def as_simple_readers_do(base: Any, folder: Path) -> Any:
    """W + alpha / r B A: one r and one alpha for all, and nothing else of the configuration is looked at."""
    said = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert isinstance(said["lora_alpha"], int)
    for key in [k for k in tensors if ".lora_A." in k]:
        a, b = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"))
        layer = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        assert a.shape[0] == said["r"]
        change = said["lora_alpha"] / said["r"] * b @ a
        layer.weight = torch.nn.Parameter(layer.weight + change, requires_grad=False)
    assert not tensors
    return base


@pytest.mark.parametrize("target", ["vllm", "tgi", "ollama", "peft", "transformers"])
def test_scales_and_ranks_are_folded_for_the_simplest_reader(view: View, tmp_path: Path, target: str) -> None:
    made = view(patterned(task_type="CAUSAL_LM"))
    meant = logits(made)
    done = export(made, target, tmp_path / "out")
    assert done.report is not None and done.report.exact
    assert done.drift is not None and done.drift.share < 1e-5
    folder = tmp_path / "out" / "adapter" if target == "ollama" else tmp_path / "out"
    assert off(logits(as_simple_readers_do(llama(), folder)), meant) < 1e-5
    said = json.loads((folder / "adapter_config.json").read_text())
    assert (said["use_rslora"], said["rank_pattern"], said["alpha_pattern"]) == (False, {}, {})
    assert said["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert off(logits(peft.PeftModel.from_pretrained(llama(), folder).eval()), meant) < 1e-5
    assert off(logits(PeftModel.from_pretrained(llama(), folder)), meant) < 1e-5
    assert off(logits(made), meant) == 0


def test_transformers_loads_the_folder_by_itself(view: View, tmp_path: Path) -> None:
    made = view(patterned(task_type="CAUSAL_LM"), LoraConfig(r=2, init_lora_weights=False), active="a - 0.5*b")
    export(made, "transformers", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert off(logits(found), logits(made)) < 1e-5


def test_every_layer_of_a_kind_is_adapted(view: View, tmp_path: Path) -> None:
    """TGI skips a kind of layer that is not adapted in all layers."""
    made = view(LoraConfig(r=2, layers_to_transform=[1], init_lora_weights=False, target_modules=["q_proj"]))
    export(made, "tgi", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 4
    assert not any(t.any() for k, t in tensors.items() if ".layers.0." in k)
    assert off(logits(as_simple_readers_do(llama(), tmp_path / "out")), logits(made)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, use_dora=True, init_lora_weights=False),
        IA3Config(),
        FullCopyConfig(target_modules=["v_proj", "down_proj"]),
    ],
    ids=lambda config: config.method,
)
def test_other_methods_become_a_lora_with_the_error_that_is_told(view: View, tmp_path: Path, config: Any) -> None:
    made = view(config)
    meant = logits(made)
    done = export(made, "vllm", tmp_path / "full", r="full")
    assert done.report is not None and done.report.exact
    assert off(logits(as_simple_readers_do(llama(), tmp_path / "full")), meant) < 1e-5
    done = export(made, "vllm", tmp_path / "small", r=2)
    made.merge_adapter()
    base = llama()
    small = as_simple_readers_do(llama(), tmp_path / "small")
    assert done.report is not None
    for row in done.report.rows:
        path = f"{row.path}.weight"
        change = (made.get_base_model().get_parameter(path) - base.get_parameter(path)).double()
        kept = (small.get_parameter(path) - base.get_parameter(path)).double()
        singular = np.linalg.svd(change.numpy(), compute_uv=False)
        best = float(np.sqrt((singular[2:] ** 2).sum() / (singular**2).sum()))  # Eckart and Young
        assert row.apart == pytest.approx(best, rel=1e-3)
        assert float((kept - change).norm() / change.norm()) == pytest.approx(best, rel=1e-3)
    made.unmerge_adapter()
    assert done.drift is not None
    assert 0.01 < done.drift.share < 1


def test_what_peft_reads_is_written_as_it_is(view: View, tmp_path: Path) -> None:
    for number, config in enumerate(
        (LoraConfig(r=3, use_dora=True), IA3Config(), PromptTuningConfig(num_virtual_tokens=3))
    ):
        made = view(config)
        done = export(made, "peft", tmp_path / str(number))
        assert done.report is None
        found = peft.PeftModel.from_pretrained(llama(), tmp_path / str(number)).eval()
        theirs = logits(found)[:, -ids().shape[1] :]
        assert off(theirs, logits(made)) < 1e-5
        made.unload()


def test_transformers_gets_dora_as_a_lora(view: View, tmp_path: Path) -> None:
    """Of DoRA it loads A and B alone."""
    made = view(LoraConfig(r=3, use_dora=True, init_lora_weights=False))
    done = export(made, "transformers", tmp_path / "out", r="full")
    assert done.report is not None and done.report.exact
    found = llama()
    found.load_adapter(str(tmp_path / "out"))
    assert off(logits(found), logits(made)) < 1e-5
    assert export(made, "transformers", tmp_path / "less").report is not None


def test_a_composition_with_biases_and_copies_is_one_adapter_for_peft(view: View, tmp_path: Path) -> None:
    base = gpt2()
    lora = LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only", init_lora_weights=False)
    made = view(lora, LoraConfig(r=3, target_modules=["c_fc"], init_lora_weights=False), base=base, active="a + 0.5*b")
    export(made, "peft", tmp_path / "out")
    found = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "out").eval()
    assert off(logits(found), logits(made)) < 1e-5
    with pytest.raises(ValueError, match=r"vllm takes a plain LoRA at linear layers: the bias of .* is trained"):
        export(made, "vllm", tmp_path / "no")


def test_a_checkpoint_of_trainer_becomes_a_folder_for_peft(view: View, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made = view(patterned(task_type="CAUSAL_LM"))
    (tmp_path / "checkpoint").mkdir()
    save_file(dict(made.state_dict()), tmp_path / "checkpoint" / "model.safetensors", {"format": "pt"})
    again = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint")
    export(again, "peft", tmp_path / "out")
    assert off(logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()), logits(made)) < 1e-5


@pytest.mark.parametrize("make", [llama, gpt2])
def test_mlx_computes_the_same(view: View, tmp_path: Path, make: Any) -> None:
    """By mlx-lm's formula, y + scale (x lora_a) lora_b, at what `keys` names in the last num_layers layers."""
    made = view(LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", init_lora_weights=False), base=make())
    export(made, "mlx", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    base, start = make(), "model.layers" if make is llama else "transformer.h"
    keys, scale = said["lora_parameters"]["keys"], said["lora_parameters"]["scale"]
    assert said["num_layers"] == 2
    for i, layer in enumerate(base.get_submodule(start)):
        for key in keys:
            a, b = (tensors.pop(f"{start.replace('transformer', 'model')}.{i}.{key}.lora_{end}") for end in "ab")
            module = layer.get_submodule(key)
            change = scale * a @ b  # (I, O)
            module.weight = torch.nn.Parameter(module.weight + (change if make is gpt2 else change.T))
    assert not tensors
    assert off(logits(base), logits(made)) < 1e-5


def test_ollama_gets_a_modelfile(view: View, tmp_path: Path) -> None:
    made = view(patterned())
    export(made, "ollama", tmp_path / "out")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert f"FROM {tmp_path / 'base'}" in lines
    assert "ADAPTER ./adapter" in lines
    made.unload()
    made = view(LoraConfig(r=2, init_lora_weights=False), base=gpt2())  # no adapter that Ollama converts itself
    export(made, "ollama", tmp_path / "gpt2")
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "gpt2" / "Modelfile").read_text()
    assert (tmp_path / "gpt2" / "adapter.gguf").is_file()


REFUSED = [
    (PromptTuningConfig(num_virtual_tokens=3), "vllm", "virtual tokens .* Nor can that be merged"),
    (PromptTuningConfig(num_virtual_tokens=3), "transformers", "takes no virtual tokens"),
    (PromptTuningConfig(num_virtual_tokens=3), "onnx", "cannot be merged into weights"),
    (BottleneckConfig(bottleneck_size=2), "mlx", "modules between layers"),
    (BottleneckConfig(bottleneck_size=2), "onnx", "modules between layers"),
    (LoraConfig(r=2, modules_to_save=["lm_head"]), "vllm", r"trained copy of 'lm_head'.*merged=True"),
    (LoraConfig(r=2, target_modules=["embed_tokens"]), "tgi", r"'model.embed_tokens' is adapted, an embedding"),
    (BitFitConfig(target_modules=["q_proj"]), "transformers --merged", "biases to layers that have none"),
    (LoraConfig(r=2, target_parameters=["nothing"]), "vllm", "match no parameter"),
]


@pytest.mark.parametrize(("config", "target", "message"), REFUSED, ids=lambda x: getattr(x, "method", str(x)[:12]))
def test_what_a_program_does_not_take_is_refused_by_name(
    view: View, tmp_path: Path, config: Any, target: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        name, _, merged = target.partition(" ")
        export(view(config), name, tmp_path / "out", merged=bool(merged))
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    assert list(tmp_path.iterdir()) == []


def test_options_without_effect_are_errors(view: View, tmp_path: Path) -> None:
    made = view(LoraConfig(r=2))
    for target, options, message in (
        ("peft", {"merged": True}, "takes adapters only"),
        ("onnx", {"merged": True}, "has no effect"),
        ("vllm", {"merged": True, "r": 2}, "no effect on a merged model"),
        ("vllm", {"quantise": "int8"}, "no meaning here"),
        ("onnx", {"quantise": "q8_0"}, "takes 'int8'"),
        ("vlm", {}, "Did you mean 'vllm'"),
        ("vllm", {"adapters": "nobody"}, "There is no adapter 'nobody'"),
    ):
        with pytest.raises(ValueError, match=message):
            export(made, target, tmp_path / "out", **options)
    made.merge_adapter()
    with pytest.raises(RuntimeError, match="merged"):
        export(made, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rank_over_the_limit_is_refused(view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = view(LoraConfig(r=520, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="rank 520; vllm takes 512 at most"):
        export(made, "vllm", tmp_path / "out")
    export(made, "vllm", tmp_path / "out", r=32)  # the layer's own rank, so that nothing is lost
    assert off(logits(as_simple_readers_do(llama(), tmp_path / "out")), logits(made)) < 1e-4


def test_a_merged_model_is_plain(view: View, tmp_path: Path) -> None:
    made = view(LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False), IA3Config())
    made.set_adapter("a >> b")
    meant, before = logits(made), made.get_base_model().state_dict()
    before = {k: v.clone() for k, v in before.items()}
    done = export(made, "vllm", tmp_path / "out", merged=True)
    assert done.drift is not None and done.drift.share < 1e-5
    assert off(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), meant) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in made.get_base_model().state_dict().items())
    assert made.composition == "a >> b" or repr(made.composition) == "a >> b"
    assert off(logits(made), meant) == 0


def test_a_tied_head_that_differs_after_the_merge_is_kept(view: View, tmp_path: Path) -> None:
    made = view(LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False), base=gpt2())
    export(made, "transformers", tmp_path / "out", merged=True)
    assert off(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(made)) < 1e-5
    assert made.get_base_model().config.tie_word_embeddings is True
