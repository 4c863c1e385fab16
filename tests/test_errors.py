"""Wrong configurations: one clear error each, before anything is changed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import coadapt
from cases import CASES
from coadapt import BottleneckConfig, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from models import bert, bloom, gpt2, llama, logits, plain, t5
from steps import traces


def refused(make: Callable[..., Any], config: Callable[[], Any], kind: type[Exception], *parts: str) -> None:
    """Attaching fails with `parts` in the message, and base and view are as before: alone, and as a second adapter."""
    base = make()
    before = traces(base)
    with pytest.raises(kind) as caught:
        get_peft_model(base, config())
    assert [p for p in parts if p not in str(caught.value)] == [], str(caught.value)
    assert traces(base) == before
    view = get_peft_model(base, BottleneckConfig(bottleneck_size=3), adapter_name="there")
    keys, attached, out = sorted(view.state_dict()), traces(base), logits(view)
    with pytest.raises(kind):
        view.add_adapter("new", config())
    with pytest.raises(kind):
        get_peft_model(view, config())
    assert (sorted(view.state_dict()), traces(base), view.active_adapters) == (keys, attached, ["there"])
    assert torch.equal(logits(view), out)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TARGETS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "nothing": (llama, {"target_modules": ["query"]}, ("query", "nearest", *LINEARS)),
    "partly nothing": (llama, {"target_modules": ["q_proj", "v_prj"]}, ("['v_prj']", "v_proj", *LINEARS)),
    "several": (llama, {"target_modules": ["upproj", "dwn_proj"]}, ("upproj", "up_proj", "dwn_proj", "down_proj")),
    "an end that is no whole part": (llama, {"target_modules": ["proj"]}, ("'proj'", "q_proj")),
    "a regular expression": (llama, {"target_modules": r".*\.query"}, ("regular expression", "query", "q_proj")),
    "a name that is no list": (llama, {"target_modules": "q_proj"}, ("regular expression", "q_proj")),
    "empty": (llama, {"target_modules": []}, ("target_modules is empty",)),
    "what has no weight": (llama, {"target_modules": ["self_attn"]}, ("self_attn", "LlamaAttention", "q_proj")),
    "a norm": (gpt2, {"target_modules": ["ln_1"]}, ("ln_1", "LayerNorm")),
    "nobody's": (t5, {"target_modules": ["q_proj"]}, ("q_proj", "T5ForConditionalGeneration", "wi", "wo")),
    "no usual place": (plain, {}, ("Plain", "first", "second", "head", "target_modules")),
    "excluded nothing": (llama, {"exclude_modules": ["gate_proj"]}, ("exclude_modules", "gate_proj")),
    "excluded everything": (llama, {"exclude_modules": ["q_proj", "v_proj"]}, ("exclude_modules", "no target")),
    "pattern without layers": (llama, {"layers_pattern": "layers"}, ("layers_pattern", "layers_to_transform")),
    "layers that are not there": (llama, {"layers_to_transform": [1, 7]}, ("layers_to_transform", "[7]", "[0, 1]")),
    "a pattern that is nobody's": (llama, {"layers_to_transform": [1], "layers_pattern": "blocks"}, ("layers_",)),
    "module to save": (llama, {"modules_to_save": ["lm_haed"]}, ("modules_to_save", "lm_haed", "lm_head")),
    "saved and targeted": (llama, {"modules_to_save": ["q_proj"]}, ("modules_to_save", "target_modules", "q_proj")),
    "rank pattern": (llama, {"rank_pattern": {"up_proj": 4}}, ("rank_pattern", "up_proj", "q_proj")),
    "alpha pattern": (llama, {"alpha_pattern": {"q_prj": 4}}, ("alpha_pattern", "q_prj", "q_proj")),
    "transposed": (llama, {"fan_in_fan_out": True}, ("fan_in_fan_out", "True")),
    "bias of layers without": (llama, {"bias": "all"}, ("bias='all'", "none")),
    "a start that is not attached": (llama, {"init_from": "other"}, ("other",)),
}


@pytest.mark.parametrize("which", TARGETS)
def test_targets(which: str) -> None:
    make, options, parts = TARGETS[which]
    base = make()
    if make is not plain:
        refused(make, lambda: LoraConfig(**options), ValueError, *parts)
        return
    before = traces(base)
    with pytest.raises(ValueError) as caught:
        get_peft_model(base, LoraConfig(**options))
    assert [p for p in parts if p not in str(caught.value)] == []
    assert traces(base) == before


def test_a_layer_that_is_never_called() -> None:
    refused(t5, lambda: LoraConfig(target_modules=["shared"]), ValueError, "shared", "embed_tokens")


OPTIONS: dict[str, tuple[type[PeftConfig], dict[str, Any], tuple[str, ...]]] = {
    "rank 0": (LoraConfig, {"r": 0}, ("r=0", "at least 1")),
    "rank -1": (LoraConfig, {"r": -1}, ("r=-1",)),
    "rank 1.5": (LoraConfig, {"r": 1.5}, ("r=1.5", "whole number")),
    "rank 0 in a pattern": (LoraConfig, {"rank_pattern": {"q_proj": 0}}, ("rank_pattern['q_proj']=0",)),
    "dropout": (LoraConfig, {"lora_dropout": 1.5}, ("lora_dropout=1.5", "[0, 1)")),
    "bias": (LoraConfig, {"bias": "lora"}, ("bias='lora'", "lora_only")),
    "start": (LoraConfig, {"init_lora_weights": "pizza"}, ("init_lora_weights='pizza'", "gaussian")),
    "misspelt": (LoraConfig, {"lora_aplha": 8}, ("lora_aplha", "lora_alpha", "r, ")),
    "another method's": (PromptTuningConfig, {"r": 8}, ("PromptTuningConfig", "'r'")),
    "targets of a prompt": (PromptTuningConfig, {"target_modules": ["q"]}, ("target_modules",)),
    "layers of a prefix": (PrefixTuningConfig, {"layers_to_transform": [0]}, ("layers_to_transform",)),
    "no tokens": (PromptTuningConfig, {"num_virtual_tokens": 0}, ("num_virtual_tokens=0",)),
    "no tokens of a prefix": (PrefixTuningConfig, {"num_virtual_tokens": -3}, ("num_virtual_tokens=-3",)),
    "text without TEXT": (
        PromptTuningConfig,
        {"prompt_tuning_init_text": "x"},
        ("prompt_tuning_init_text", "no effect", "RANDOM"),
    ),
    "TEXT without text": (PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, ("prompt_tuning_init_text",)),
    "unknown start": (PromptTuningConfig, {"prompt_tuning_init": "TXT"}, ("'TXT'", "TEXT")),
    "both sizes": (
        BottleneckConfig,
        {"bottleneck_size": 4, "reduction_factor": 2},
        ("bottleneck_size", "reduction_factor"),
    ),
    "placement": (BottleneckConfig, {"placement": "pfeifer"}, ("placement='pfeifer'", "'pfeiffer'")),
    "activation": (BottleneckConfig, {"non_linearity": "rellu"}, ("non_linearity='rellu'", "relu")),
    "type": (LoraConfig, {"peft_type": "PREFIX_TUNING"}, ("LORA", "PREFIX_TUNING")),
    "task": (LoraConfig, {"task_type": "CAUSAL"}, ("task_type='CAUSAL'", "CAUSAL_LM")),
    "offset of a decoupled prefix": (
        PrefixTuningConfig,
        {"prefix_type": "decoupled", "position_offset": 4},
        ("position_offset",),
    ),
}


@pytest.mark.parametrize("which", OPTIONS)
def test_options(which: str) -> None:
    config, options, parts = OPTIONS[which]
    needed = {} if config in (LoraConfig, BottleneckConfig) else {"num_virtual_tokens": 4}
    unread = options.keys() - {field.name for field in dataclasses.fields(config)}
    with pytest.raises(TypeError if unread else ValueError) as caught:
        config(**{**needed, **options})
    assert [p for p in parts if p not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("make, width", [(llama, 16), (gpt2, 32), (t5, 24), (bert, 32)])
def test_prefix_sizes(make: Any, width: int) -> None:
    wrong = {
        "token_dim": (20, width),
        "num_layers": (3, 2),
        "encoder_hidden_size": (5, 32),
        "num_attention_heads": (3, ""),
    }
    for field, (given, needed) in wrong.items():
        sizes: dict[str, Any] = {"num_virtual_tokens": 4, field: given}
        refused(make, lambda s=sizes: PrefixTuningConfig(**s), ValueError, f"{field}={given}", str(needed))
    sites = PrefixTuningConfig(num_virtual_tokens=4, prefix_sites=["decodr"])
    refused(make, lambda: sites, ValueError, "prefix_sites", "decodr", "decoder" if make is not bert else "encoder")


@pytest.mark.parametrize("make", [llama, gpt2, bloom, t5, bert])
def test_prompt_sizes(make: Any) -> None:
    wrong = {
        "token_dim": (100, 32),
        "num_layers": (5, 2),
        "num_attention_heads": (3, 4),
        "num_transformer_submodules": (3, ""),
    }
    for field, (given, needed) in wrong.items():
        sizes: dict[str, Any] = {"num_virtual_tokens": 4, field: given}
        refused(make, lambda s=sizes: PromptTuningConfig(**s), ValueError, f"{field}={given}", str(needed))


def test_models_that_cannot_take_a_method() -> None:
    def prefix(**options: Any) -> Any:
        return lambda: PrefixTuningConfig(num_virtual_tokens=4, **options)

    def prompt(**options: Any) -> Any:
        return lambda: PromptTuningConfig(num_virtual_tokens=4, **options)

    refused(bloom, prefix(), ValueError, "BloomForCausalLM", "BloomAttention")
    refused(t5, prefix(position_offset=4), ValueError, "position_offset", "T5")
    refused(llama, prompt(prompt_sites=["encoder"]), ValueError, "prompt_sites", "encoder")
    text = prompt(prompt_tuning_init="TEXT", prompt_tuning_init_text="a")
    refused(llama, text, ValueError, "tokenizer_name_or_path")
    for config in (CASES["prompt"], CASES["prefix"]):
        with pytest.raises(ValueError, match="Plain"):
            get_peft_model(plain(), config)


def test_classes_that_are_not_ours() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match=r"peft.*coadapt"):
        get_peft_model(llama(), peft.LoraConfig(r=4))
    refused(llama, lambda: {"r": 8}, TypeError, "LoraConfig", "dict")
    with pytest.raises(TypeError, match="DistributedDataParallel"):
        get_peft_model(nn.DataParallel(llama()), CASES["lora"])
    with pytest.raises(TypeError, match="from_pretrained"):
        coadapt.AutoPeftModelForCausalLM()
