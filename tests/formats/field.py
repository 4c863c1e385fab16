"""The field's library beside coadapt: the same configurations in both, its models, saved and loaded."""

import importlib.machinery
import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import coadapt
import models
from coadapt import PeftModel, get_peft_model
from coadapt.core.clusters import groups
from coadapt.formats.keys import entries
from models import FAMILIES, MODELS, conv, ids, plain, stir, volumes

torch.sparse.check_sparse_tensor_invariants.disable()  # or their SHiRA warns that nobody has said

torch.sparse.check_sparse_tensor_invariants.disable()  # else torch warns that the field's FRoD does not say

CAUSAL = {"task_type": "CAUSAL_LM"}
SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM"}
CLASSES = {"task_type": "SEQ_CLS"}


PLAIN: dict[str, Callable[[], Any]] = {"plain": plain, "conv": conv, "volumes": volumes}
"""Models that are none of transformers', so that they have no task."""


@dataclass(frozen=True)
class Both:
    """Options that each library has as a class of its own."""

    name: str
    options: dict[str, Any]


def _both(name: str, **options: Any) -> Both:
    return Both(name, options)


def _bd(a: list[str], b: list[str]) -> Both:
    return _both("BdLoraConfig", target_modules_bd_a=a, target_modules_bd_b=b, nblocks=2, match_strict=False)


def _of(library: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {k: getattr(library, v.name, None)(**v.options) if isinstance(v, Both) else v for k, v in options.items()}


@dataclass(frozen=True)
class Case:
    """The same configuration in both libraries, on one of the test models."""

    model: str
    config: str
    options: dict[str, Any]
    theirs: dict[str, Any] | None = None
    """Options that the field's library needs besides, where it does not find them itself."""
    own: dict[str, Any] | None = None
    """Options that coadapt needs besides, to do as the field's library does."""
    wrong_gradients: str = ""
    """What is wrong with the field's own gradients, which are then not compared."""

    def base(self) -> Any:
        return (MODELS | FAMILIES | PLAIN | {"tied": tied})[self.model]()

    def ours(self) -> Any:
        return getattr(coadapt, self.config)(**_of(coadapt, {**self.options, **(self.own or {})}))

    def field(self) -> Any:
        quiet = {"progressbar": False} if self.config == "FrodConfig" else {}
        return getattr(peft, self.config)(**_of(peft, {**self.options, **quiet, **(self.theirs or {})}))


APART = "tied factors are parameters of their own in the same memory, each with a part of the gradient"
BATCH = {"routing": "batch"}
CORE = "with a core tensor, its backward multiplies the gradients of B1 and B2 by the other product's factors"
"""Of LoHa."""


def task(model: str) -> dict[str, str]:
    return {} if model in PLAIN else {"t5": SEQ2SEQ, "bert": CLASSES}.get(model, CAUSAL)


def tied() -> nn.Module:
    """A Llama whose head is tied to its embedding."""
    return MODELS["llama"](tie_word_embeddings=True)


def lora(model: str, **options: Any) -> Case:
    return Case(model, "LoraConfig", {"r": 4, "lora_alpha": 8, **task(model), **options})


def prompt(model: str, **options: Any) -> Case:
    return Case(model, "PromptTuningConfig", {"num_virtual_tokens": 3, **task(model), **options})


def prefix(model: str, **options: Any) -> Case:
    return Case(model, "PrefixTuningConfig", {"num_virtual_tokens": 3, **task(model), **options})


def multitask(model: str) -> Case:
    return other(model, "MultitaskPromptTuningConfig", num_virtual_tokens=3, num_tasks=3, num_ranks=2)


def other(model: str, config: str, **options: Any) -> Case:
    return Case(model, config, {**task(model), **options})


CASES = {
    "llama-lora": lora("llama"),
    "llama-all-linear": lora("llama", target_modules="all-linear"),
    "llama-replicated": lora(
        "llama", target_modules=["q_proj", "down_proj"], layer_replication=[[0, 2], [0, 2], [1, 2]]
    ),
    "llama-regex": lora("llama", target_modules=r".*layers\.1\..*(q|down)_proj"),
    "llama-excluded": lora("llama", target_modules=["q_proj", "up_proj"], exclude_modules=["layers.0.mlp.up_proj"]),
    "llama-layers": lora("llama", target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "tied-lora": replace(
        lora("tied", target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=True), wrong_gradients=APART
    ),
    "tied-head": replace(
        lora("tied", target_modules=["lm_head", "v_proj"], ensure_weight_tying=True, use_rslora=True),
        wrong_gradients=APART,
    ),
    "tied-saved": lora("tied", modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tied-tokens": lora("tied", trainable_token_indices=[3, 7, 20], ensure_weight_tying=True),
    "llama-embedding": lora("llama", target_modules=["embed_tokens", "v_proj"]),
    "llama-rslora": lora("llama", use_rslora=True),
    "llama-patterns": lora(
        "llama",
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.v_proj": 2, "v_proj": 3, r".*layers\.1.*q_proj": 1},
        alpha_pattern={"down_proj": 32},
    ),
    "llama-saved": lora("llama", modules_to_save=["lm_head", "input_layernorm"]),
    "gpt2-lora": lora("gpt2"),
    "gpt2-all-linear": lora("gpt2", target_modules="all-linear"),
    "gpt2-embedding": lora("gpt2", target_modules=["wpe", "c_attn"]),
    "gpt2-lora-bias": lora("gpt2", bias="lora_only", target_modules=["c_attn", "c_fc"]),
    "gpt2-all-bias": lora("gpt2", bias="all"),
    "bloom-lora": lora("bloom"),
    "t5-lora": lora("t5"),
    "t5-all-linear": lora("t5", target_modules="all-linear"),
    "t5-layers": lora("t5", target_modules=["q", "wi"], layers_to_transform=1),
    "mixtral-experts": lora(
        "mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "mixtral-router": lora("mixtral", target_parameters=["mlp.gate.weight", "mlp.experts.gate_up_proj"]),
    "llama-tokens": other("llama", "TrainableTokensConfig", token_indices=[3, 7, 20]),
    "gpt2-tokens": other("gpt2", "TrainableTokensConfig", token_indices=[3, 7, 20], target_modules=["wte"]),
    "t5-tokens": other("t5", "TrainableTokensConfig", token_indices=[3, 7, 20]),
    "llama-lora-tokens": lora("llama", trainable_token_indices=[3, 7, 20]),
    "t5-lora-tokens": lora("t5", trainable_token_indices=[3, 7, 20]),
    "gpt2-lora-tokens": lora("gpt2", trainable_token_indices={"wte": [3, 7, 20]}),
    "bert-lora": lora("bert"),
    "plain-conv": lora("plain", target_modules=["conv", "embed", "first"]),
    "conv-lora": lora("conv", target_modules=["first", "second"]),
    "volumes-lora": lora("volumes", target_modules=["first", "second"]),
    "plain-bias": lora("plain", target_modules=["conv", "first"], bias="all"),
    "llama-own-bias": lora("llama", lora_bias=True, alpha_pattern={"v_proj": 3}),
    "gpt2-own-bias": lora("gpt2", lora_bias=True, bias="all"),
    "plain-own-bias": lora("plain", lora_bias=True, target_modules=["conv", "first"]),
    "llama-alora": lora("llama", target_modules="all-linear", alora_invocation_tokens=[28, 34]),
    "gpt2-alora": lora("gpt2", alora_invocation_tokens=[23]),
    "llama-bd": lora("llama", target_modules="all-linear", use_bdlora=_bd(["q_proj", "up_proj"], ["o_proj"])),
    "t5-bd": lora("t5", use_bdlora=_bd(["q"], ["v"])),
    "llama-velora": lora("llama", target_modules="all-linear", velora_config=_both("VeloraConfig", num_groups=4)),
    "gpt2-velora": lora("gpt2", velora_config=_both("VeloraConfig", num_groups=4)),
    "t5-velora": lora("t5", velora_config=_both("VeloraConfig", num_groups=5, init_type="random")),
    "llama-monteclora": lora("llama", monteclora_config=_both("MontecloraConfig", num_samples=3)),
    "gpt2-monteclora": lora("gpt2", monteclora_config=_both("MontecloraConfig", num_samples=2, use_entropy=True)),
    "t5-monteclora": lora("t5", target_modules=["q", "wo"], monteclora_config=_both("MontecloraConfig")),
    "llama-kasa": lora("llama", target_modules="all-linear", kasa_config=_both("KasaConfig")),
    "t5-kasa": lora("t5", kasa_config=_both("KasaConfig")),
    "llama-dora": lora("llama", use_dora=True, target_modules="all-linear"),
    "gpt2-dora": lora("gpt2", use_dora=True, bias="lora_only"),
    "t5-dora": lora("t5", use_dora=True),
    "plain-dora": lora("plain", use_dora=True, target_modules=["conv", "embed", "first"]),
    "conv-dora": lora("conv", use_dora=True, target_modules=["first", "second"]),
    "volumes-dora": lora("volumes", use_dora=True, target_modules=["first", "second"]),
    "llama-ia3": other("llama", "IA3Config"),
    "gpt2-ia3": other("gpt2", "IA3Config"),
    "t5-ia3": other("t5", "IA3Config"),
    "bloom-ia3": other("bloom", "IA3Config"),
    "bert-ia3": other("bert", "IA3Config", target_modules=["key", "value"], feedforward_modules=[]),
    "plain-ia3": other("plain", "IA3Config", target_modules=["first", "second"], feedforward_modules=["second"]),
    "conv-ia3": other("conv", "IA3Config", target_modules=["first", "second"], feedforward_modules=["second"]),
    "volumes-ia3": other("volumes", "IA3Config", target_modules=["first", "second"], feedforward_modules=["second"]),
    "llama-ln": other("llama", "LNTuningConfig"),
    "gpt2-ln": other("gpt2", "LNTuningConfig"),
    "t5-ln": other("t5", "LNTuningConfig"),
    "llama-loha": other("llama", "LoHaConfig", r=3, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "t5-loha": other("t5", "LoHaConfig", target_modules=["q", "wo"]),
    "plain-loha": other("plain", "LoHaConfig", r=3, target_modules=["first", "conv"]),
    "plain-loha-core": replace(
        other("plain", "LoHaConfig", r=3, target_modules=["conv"], use_effective_conv2d=True), wrong_gradients=CORE
    ),
    "llama-lokr": other("llama", "LoKrConfig", r=2, rank_pattern={"v_proj": 1}, alpha_pattern={"q_proj": 3}),
    "llama-lokr-both": other("llama", "LoKrConfig", r=2, decompose_both=True, decompose_factor=8),
    "t5-lokr": other("t5", "LoKrConfig", r=4, target_modules=["q", "wo"], init_weights="lycoris"),
    "plain-lokr": other("plain", "LoKrConfig", r=2, target_modules=["first", "conv"]),
    "conv-lokr-core": other("conv", "LoKrConfig", r=1, target_modules=["first", "second"], use_effective_conv2d=True),
    "conv-loha-core": replace(
        other("conv", "LoHaConfig", r=3, alpha=64, target_modules=["first", "second"], use_effective_conv2d=True),
        wrong_gradients=CORE,
    ),
    "llama-fourierft": other("llama", "FourierFTConfig", n_frequency=40, n_frequency_pattern={"v_proj": 7}),
    "gpt2-fourierft": other("gpt2", "FourierFTConfig", n_frequency=40, target_modules=["c_attn", "c_fc"], scaling=20.0),
    "t5-fourierft": other("t5", "FourierFTConfig", n_frequency=40, random_loc_seed=5),
    "plain-fourierft": other("plain", "FourierFTConfig", n_frequency=40, target_modules=["first"]),
    # its gradient with respect to the input is wrong in theirs, so that adapters further down get others: one layer
    "llama-c3a": other("llama", "C3AConfig", block_size=8, block_size_pattern={"v_proj": 4}, layers_to_transform=[1]),
    "t5-c3a": other("t5", "C3AConfig", block_size=8, target_modules=r"decoder\.block\.1\..*\.wi"),
    "llama-shadow": other("llama", "ShadowConfig", r=4),
    "llama-shadow-apart": other(
        "llama",
        "ShadowConfig",
        shadow_hidden_size=16,
        shadow_num_attention_heads=2,
        shadow_num_hidden_layers=3,
        shadow_intermediate_size=24,
        update_hidden_size=5,
    ),
    "gpt2-shadow": other("gpt2", "ShadowConfig", shadow_alpha=0.5),
    "bloom-shadow": other("bloom", "ShadowConfig", shadow_hidden_size=16),
    "qwen3-shadow": other("qwen3", "ShadowConfig", target_modules=["model.layers.1"], share_embeddings=False),
    "llama-shira": other("llama", "ShiraConfig", r=2, random_seed=3),
    "t5-shira": other("t5", "ShiraConfig", r=2),
    "llama-beft": other("llama", "BeftConfig"),
    "t5-beft": other("t5", "BeftConfig"),
    "bert-beft": other("bert", "BeftConfig"),
    "llama-adalora": other("llama", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, lora_alpha=3),
    "gpt2-adalora": other("gpt2", "AdaLoraConfig", total_step=9, init_r=4, target_r=2),
    "t5-adalora": other("t5", "AdaLoraConfig", total_step=9, init_r=4, target_modules=["q", "wi"], target_r=2),
    "llama-adamss": other("llama", "AdamssConfig", r=8, num_subspaces=3),
    "llama-adamss-ranks": other("llama", "AdamssConfig", r=6, subspace_rank=2, use_dynamic_rank=True),
    "bert-adamss": other("bert", "AdamssConfig", r=8, random_seed=2),
    "t5-adamss": other("t5", "AdamssConfig", r=8, target_modules=["q", "wi"]),
    "plain-adalora": other("plain", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, target_modules=["first"]),
    "conv-adalora": other(
        "conv", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, target_modules=["first", "second"]
    ),
    "llama-oft": other("llama", "OFTConfig", oft_block_size=8),
    "llama-oft-exact": other("llama", "OFTConfig", r=2, oft_block_size=0, use_cayley_neumann=False, block_share=True),
    "llama-coft": other("llama", "OFTConfig", oft_block_size=16, coft=True, eps=0.3),
    "bert-oft": other("bert", "OFTConfig", oft_block_size=8),
    "t5-oft": other("t5", "OFTConfig", oft_block_size=4, num_cayley_neumann_terms=7),
    "plain-oft": other("plain", "OFTConfig", oft_block_size=8, target_modules=["embed", "first"]),
    "llama-hra": other("llama", "HRAConfig", r=4),
    "llama-hra-odd": other("llama", "HRAConfig", r=3, apply_GS=True),
    "t5-hra": other("t5", "HRAConfig", r=2, init_weights=False),
    "bert-hra": other("bert", "HRAConfig", r=4, target_modules=["query", "value"]),
    "conv-hra": other("conv", "HRAConfig", r=4, target_modules=["first", "second"]),
    "llama-road": other("llama", "RoadConfig", group_size=8),
    "llama-road-2": other("llama", "RoadConfig", variant="road_2", group_size=16),
    "t5-road-4": other("t5", "RoadConfig", variant="road_4", group_size=4),
    "bert-road-4": other("bert", "RoadConfig", variant="road_4", group_size=8),
    "llama-hira": other("llama", "HiraConfig", r=4, target_modules="all-linear"),
    "gpt2-hira": other("gpt2", "HiraConfig", r=4),
    "t5-hira": other("t5", "HiraConfig", r=4, target_modules=["q", "wo"]),
    "plain-hira": other("plain", "HiraConfig", r=4, target_modules=["conv", "embed", "first"]),
    "conv-hira": other("conv", "HiraConfig", r=4, target_modules=["first", "second"]),
    "volumes-hira": other("volumes", "HiraConfig", r=4, target_modules=["first", "second"]),
    "llama-delora": other("llama", "DeloraConfig", r=4, delora_lambda=2, lambda_pattern={"v_proj": 1}),
    "t5-delora": other("t5", "DeloraConfig", r=4, rank_pattern={"q": 2}),
    "llama-miss": other("llama", "MissConfig", r=6),
    "llama-miss-mini": other("llama", "MissConfig", r=4, mini_r=2, init_weights="mini"),
    "llama-bat": other("llama", "MissConfig", r=8, init_weights="bat"),
    "t5-miss": other("t5", "MissConfig", r=8, target_modules=["q", "wo"]),
    "bert-bat": other("bert", "MissConfig", r=4, init_weights="bat"),
    "llama-glora": other("llama", "GloraConfig", r=4),
    "bert-glora": other("bert", "GloraConfig", r=4, target_modules=["query", "value"]),
    "bert-glora-vectors": other("bert", "GloraConfig", config_A_B="vector", config_C="vector", config_D_E="vector"),
    "plain-glora": other("plain", "GloraConfig", config_A_B="none", config_C="none", target_modules=["first"]),
    "t5-glora": other("t5", "GloraConfig", config_A_B="constant"),
    "llama-deft": other("llama", "DeftConfig", r=4, alpha=6),
    "llama-deft-qr": other("llama", "DeftConfig", r=4, decomposition_method="qr", target_modules="all-linear"),
    "llama-para": other("llama", "DeftConfig", r=4, para=True),
    "gpt2-deft": other("gpt2", "DeftConfig", r=4),
    "t5-deft": other("t5", "DeftConfig", r=4),
    "llama-peanut": other("llama", "PeanutConfig", r=4, depth=2),
    "t5-peanut": other("t5", "PeanutConfig", r=4, act_fn="tanh", scaling=2.0),
    "llama-boft": other("llama", "BOFTConfig", boft_block_size=8),
    "t5-boft": other("t5", "BOFTConfig", boft_block_size=0, boft_block_num=4),
    "bert-boft": other("bert", "BOFTConfig", boft_block_size=4, target_modules=["query", "value"]),
    "conv-boft": other("conv", "BOFTConfig", boft_block_size=9, target_modules=["first", "second"]),
    "llama-psoft": other("llama", "PsoftConfig", r=4),
    "llama-psoft-series": other("llama", "PsoftConfig", r=6, use_cayley_neumann=True, cayley_neumann_eps=0.5),
    "t5-psoft": other(
        "t5", "PsoftConfig", r=4, psoft_orth=False, psoft_mag_b=False, psoft_svd="lowrank", random_seed=7
    ),
    "bert-psoft": other("bert", "PsoftConfig", r=4, ab_svd_init="pissa_init", target_modules=["query", "value"]),
    "llama-vera": other("llama", "VeraConfig", r=8, target_modules="all-linear"),
    "llama-vera-seed": other("llama", "VeraConfig", r=8, save_projection=False, projection_prng_key=3),
    "gpt2-vera": other("gpt2", "VeraConfig", r=8, bias="vera_only"),
    "t5-vera": other("t5", "VeraConfig", r=8, target_modules=["q", "wo"]),
    "llama-pvera": other("llama", "PveraConfig", r=8, save_projection=False),
    "gpt2-pvera": other("gpt2", "PveraConfig", r=8),
    "t5-pvera": other("t5", "PveraConfig", r=8),
    "llama-randlora": other("llama", "RandLoraConfig", r=6, randlora_alpha=12, target_modules="all-linear"),
    "llama-randlora-seed": other("llama", "RandLoraConfig", r=6, randlora_alpha=12, save_projection=False),
    "llama-randlora-sparse": other(
        "llama", "RandLoraConfig", r=6, randlora_alpha=12, sparse=True, save_projection=False
    ),
    "gpt2-randlora": other("gpt2", "RandLoraConfig", r=6, randlora_alpha=3, very_sparse=True),
    "t5-randlora": other("t5", "RandLoraConfig", r=6, randlora_alpha=3, target_modules=["q", "wo"]),
    "llama-frod": other("llama", "FrodConfig", target_modules="all-linear"),
    "llama-frod-seed": other("llama", "FrodConfig", sparse_rate=0.1, save_projection=False),
    "gpt2-frod": other("gpt2", "FrodConfig", bias="frod_only"),
    "t5-frod": other("t5", "FrodConfig", target_modules=["q", "wo"]),
    "llama-gralora": other("llama", "GraloraConfig", r=4, hybrid_r=2, target_modules="all-linear"),
    "gpt2-gralora": other("gpt2", "GraloraConfig", r=8, gralora_k=4, bias="all"),
    "t5-gralora": other("t5", "GraloraConfig", r=4, target_modules=["q", "wo"]),
    "llama-vblora": other("llama", "VBLoRAConfig", num_vectors=6, vector_length=8, target_modules="all-linear"),
    "gpt2-vblora": other("gpt2", "VBLoRAConfig", num_vectors=6, vector_length=16, topk=3),
    "t5-vblora": other("t5", "VBLoRAConfig", num_vectors=6, vector_length=4, target_modules=["q", "wo"]),
    "gpt2-vblora-topk": other(
        "gpt2", "VBLoRAConfig", num_vectors=300, vector_length=16, topk=3, save_only_topk_weights=True
    ),
    "t5-vblora-topk": other(
        "t5",
        "VBLoRAConfig",
        num_vectors=6,
        vector_length=4,
        topk=1,
        target_modules=["q", "wo"],
        save_only_topk_weights=True,
    ),
    "llama-unilora": other("llama", "UniLoraConfig", theta_d_length=50, target_modules="all-linear"),
    "llama-unilora-saved": other("llama", "UniLoraConfig", theta_d_length=50, save_indices=True),
    "gpt2-unilora": other("gpt2", "UniLoraConfig", proj_seed=3),
    "t5-unilora": other("t5", "UniLoraConfig", target_modules=["q", "wo"]),
    "llama-tinylora": other("llama", "TinyLoraConfig", u=5, target_modules="all-linear"),
    "llama-tinylora-seed": other("llama", "TinyLoraConfig", u=5, weight_tying=0.6, save_projection=False),
    "gpt2-tinylora": other("gpt2", "TinyLoraConfig", r=3, u=5, weight_tying=1.0, target_modules=["wpe", "c_attn"]),
    "t5-tinylora": other("t5", "TinyLoraConfig", u=5, target_modules=["q", "wo"]),
    "llama-lily": replace(
        other("llama", "LilyConfig", r=3, stride_A=2, target_modules=["q_proj", "v_proj"]), own=BATCH
    ),
    "llama-lily-regex": replace(other("llama", "LilyConfig", r=3, target_modules=r".*\.(q|o)_proj"), own=BATCH),
    "t5-lily": replace(other("t5", "LilyConfig", r=3, num_B=3, target_modules=["q", "wo"]), own=BATCH),
    "llama-supertuning": other("llama", "SupertuningConfig", sparsity=0.9, select_top=False),
    "llama-supra": other("llama", "SupertuningConfig", sparsity=0.9, r=3, lora_alpha=5),
    "t5-supertuning": other("t5", "SupertuningConfig", sparsity=0.9),
    "t5-supra": other("t5", "SupertuningConfig", sparsity=0.9, r=2, target_modules=["q", "wi"]),
    "llama-osf": other("llama", "OSFConfig", effective_rank=10, rank_pattern={"layers.1.*v_proj": 0.5}),
    "t5-osf": other("t5", "OSFConfig", target_modules=["q", "wi", "wo"]),
    "llama-waveft": other("llama", "WaveFTConfig", n_frequency=40, proportional_parameters=True),
    "llama-waveft-long": other(
        "llama", "WaveFTConfig", n_frequency=40, wavelet_family="db5", n_frequency_pattern={"v_proj": 7}
    ),
    "gpt2-waveft": other(
        "gpt2", "WaveFTConfig", n_frequency=40, target_modules=["c_attn", "c_fc"], wavelet_family="db3"
    ),
    "t5-waveft": other("t5", "WaveFTConfig", n_frequency=40, random_loc_seed=5, use_idwt=False),
    "plain-waveft": other("plain", "WaveFTConfig", n_frequency=40, target_modules=["first"], wavelet_family="db2"),
    "gpt2-deft-bias": other("gpt2", "DeftConfig", r=4, bias="deft_only"),
    "gpt2-fourierft-bias": other(
        "gpt2", "FourierFTConfig", n_frequency=9, target_modules=["c_attn"], bias="fourier_only"
    ),
    "gpt2-waveft-bias": other("gpt2", "WaveFTConfig", n_frequency=40, target_modules=["c_attn"], bias="all"),
    "gpt2-adalora-bias": other("gpt2", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, bias="lora_only"),
    "llama-adalora-tokens": other(
        "llama", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, trainable_token_indices=[3, 7, 20]
    ),
    "opt-adalora-bias": other(
        "opt", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, bias="all", target_modules=["fc1"]
    ),
    "opt-oft-bias": other("opt", "OFTConfig", oft_block_size=8, bias="oft_only"),
    "bert-oft-bias": other("bert", "OFTConfig", oft_block_size=8, bias="all"),
    "opt-boft-bias": other("opt", "BOFTConfig", boft_block_size=4, bias="boft_only"),
    "opt-hra-bias": other("opt", "HRAConfig", r=4, bias="all"),
    "plain-delora-bias": other("plain", "DeloraConfig", r=4, bias="delora_only", target_modules=["first"]),
    "opt-glora-bias": other("opt", "GloraConfig", r=4, config_D_E="vector", bias="glora_only"),
    "bert-glora-bias": other("bert", "GloraConfig", r=4, target_modules=["query", "value"], bias="all"),
    "opt-miss-bias": other("opt", "MissConfig", r=8, bias="MiSS_only"),
    "bert-bat-bias": other("bert", "MissConfig", r=4, init_weights="bat", bias="all"),
    "plain-c3a-bias": other("plain", "C3AConfig", block_size=4, bias="c3a_only", target_modules=["first"]),
    "llama-ptuning": other("llama", "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
    "gpt2-ptuning": other("gpt2", "PromptEncoderConfig", num_virtual_tokens=3),
    "t5-ptuning": other("t5", "PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8),
    "llama-ptuning-lstm": other(
        "llama",
        "PromptEncoderConfig",
        num_virtual_tokens=3,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=8,
        encoder_num_layers=1,
    ),
    "llama-prompt": prompt("llama"),
    "gpt2-prompt": prompt("gpt2"),
    "bloom-prompt": prompt("bloom"),
    "t5-prompt": prompt("t5"),
    "llama-cpt": other("llama", "CPTConfig", cpt_token_ids=[5, 9, 4, 8], cpt_tokens_type_mask=[1, 2, 3, 4]),
    "gpt2-cpt": other("gpt2", "CPTConfig", cpt_token_ids=[5, 9, 4, 8], opt_projection_epsilon=0.5),
    "llama-multitask": multitask("llama"),
    "gpt2-multitask": multitask("gpt2"),
    "llama-cartridge": other("llama", "CartridgeConfig", num_virtual_tokens=3),
    "gpt2-cartridge": other("gpt2", "CartridgeConfig", num_virtual_tokens=4, num_frozen_tokens=2),
    "llama-poly": other("llama", "PolyConfig", r=2, n_tasks=3, n_skills=3),
    "t5-poly": other("t5", "PolyConfig", r=2, n_tasks=2, n_splits=2, init_weights=False),
    "llama-prefix": prefix("llama"),
    "gpt2-prefix": prefix("gpt2"),
    "bert-prefix": prefix("bert"),
    "llama-adaption": other("llama", "AdaptionPromptConfig", adapter_len=3, adapter_layers=2),
    "gpt2-adaption": other("gpt2", "AdaptionPromptConfig", adapter_len=3, adapter_layers=1),
    "llama-projected": prefix("llama", prefix_projection=True, encoder_hidden_size=20),
    "gpt2-projected": prefix("gpt2", prefix_projection=True),
}
"""That both libraries take with the same options; T5's prefix stands below."""


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    """Of either library's model, or of a base; each row is of another task, where tasks are told apart."""
    tokens = ids() if tokens is None else tokens
    config = getattr(model, "peft_config", {}).get("default")
    tasks = getattr(config, "num_tasks", None) or getattr(config, "n_tasks", None)
    options = {"task_ids": torch.arange(len(tokens)).flip(0) % tasks} if tasks else {}
    return models.logits(model, tokens, **options)


def field_logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    """Of the field's model, which returns those of virtual tokens too."""
    tokens = ids() if tokens is None else tokens
    inner = model.get_base_model()
    if "pixel_values" in inspect.signature(inner.forward).parameters:
        return logits(inner, tokens)  # which the field's library has adapted in place
    got = logits(model, tokens) if hasattr(model.get_base_model(), "config") else model(tokens)
    return got[:, got.shape[1] - tokens.shape[1] :] if got.dim() == 3 and got.shape[1] > tokens.shape[1] else got


def stirred(case: Case) -> PeftModel:
    view = get_peft_model(case.base(), case.ours()).eval()
    stir(view.adapters)
    return view


def field_stirred(case: Case) -> Any:
    model = field_quietly(lambda: peft.get_peft_model(case.base(), case.field())).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def field_quietly(call: Callable[[], Any]) -> Any:
    """Their warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


class OurGroups:
    """In place of scikit-learn's KMeans: the groups are then coadapt's own, and no test of those."""

    def __init__(self, n_clusters: int, **options: Any) -> None:
        self.count = n_clusters

    def fit_predict(self, rows: Any) -> Any:
        return groups(torch.from_numpy(rows), self.count).numpy()


def grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs imports scikit-learn for groups of outputs (AdaMSS). Where it is not installed, ours stand in for it."""
    if importlib.util.find_spec("sklearn") is None:
        for name, made in {"sklearn": {}, "sklearn.cluster": {"KMeans": OurGroups}}.items():
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            vars(module).update(made)
            monkeypatch.setitem(sys.modules, name, module)


def field_loaded(base: nn.Module, folder: Path) -> Any:
    """Loaded by the field's library, which must not miss a key or meet a field that it does not know."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, folder).eval()
    told = [str(w.message) for w in seen if "randlora_A.default" not in str(w.message)]  # misses what each layer shares
    told = [t for t in told if "shadow_backbone.default.wte" not in t]  # which it does not read
    assert not [t for t in told if "missing adapter keys" in t or "Unexpected keyword" in t], told
    return model


def squared(made: Tensor) -> Tensor:
    """A loss."""
    return (made * torch.linspace(-1, 1, made.shape[-1])).pow(2).sum()


def gradients_as_stored(view: PeftModel) -> dict[str, Tensor]:
    """Gradients of the adapter "default" by the keys of files, in the layout of files.

    But for what is fixed (the base's bias, where one is trained), layouts are linear in what they hold, so gradients
    are laid out as values are.
    """
    adapter = view.get_adapter("default")
    values = {p: p.data for p in adapter.parameters()}

    def read() -> dict[str, Tensor]:
        return {entry.key: entry.read().clone() for entry in entries(adapter, view.base)}

    return _read_as_gradients(values, read)


def field_gradients(model: Any) -> dict[str, Tensor]:
    """The same of a model of the field's library."""
    values = {p: p.data for p in model.parameters() if p.requires_grad}

    def read() -> dict[str, Tensor]:
        state = field_quietly(lambda: peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        return {k: v.detach().clone() for k, v in state.items() if not over_again(k)}

    return _read_as_gradients(values, read)


def _read_as_gradients(values: dict[nn.Parameter, Tensor], read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `read` gives where each parameter is its gradient, less what is there with parameters of zero; what does not
    depend on parameters is frozen, and stays as it is."""
    laid_out: list[dict[str, Tensor]] = []
    for made in (lambda p: torch.zeros_like(p) if p.grad is None else p.grad, torch.zeros_like, torch.ones_like):
        for parameter in values:
            parameter.data = made(parameter)
        laid_out.append(read())
    for parameter, value in values.items():
        parameter.data = value
    gradients, zeros, ones = laid_out
    return {key: torch.where(zeros[key] == ones[key], t, t - zeros[key]) for key, t in gradients.items()}


def over_again(key: str) -> bool:
    """Whether the field's file holds by this key what it holds once already: RandLoRA's bases, at each site; with
    `bias="all"` those of copied modules, and of their originals; or what nothing reads, SHADOW's own table of GPT-2's
    embeddings beside the one that it shares."""
    copied = ("modules_to_save.bias", "original_module.bias")
    again = key.startswith("base_model.model.") and key.endswith(("randlora_A", "randlora_B", *copied))
    return again or key == "base_model.shadow_backbone.default.wte.weight"


def far(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())
