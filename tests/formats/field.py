"""The field's library beside coadapt: the same configurations in both, its models, saved and loaded."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import coadapt
from coadapt import PeftModel, get_peft_model
from coadapt.formats.keys import entries
from models import FAMILIES, MODELS, ids, logits, plain, stir

torch.sparse.check_sparse_tensor_invariants.disable()  # or their SHiRA warns that nobody has said

CAUSAL = {"task_type": "CAUSAL_LM"}
SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM"}
CLASSES = {"task_type": "SEQ_CLS"}


@dataclass(frozen=True)
class Case:
    """The same configuration in both libraries, on one of the test models."""

    model: str
    config: str
    options: dict[str, Any]
    theirs: dict[str, Any] | None = None
    """Options that the field's library needs besides, where it does not find them itself."""

    def base(self) -> Any:
        return (MODELS | FAMILIES | {"plain": plain})[self.model]()

    def ours(self) -> Any:
        return getattr(coadapt, self.config)(**self.options)

    def field(self) -> Any:
        return getattr(peft, self.config)(**{**self.options, **(self.theirs or {})})


def lora(model: str, **options: Any) -> Case:
    task = {"t5": SEQ2SEQ, "bert": CLASSES, "plain": {}}.get(model, CAUSAL)
    return Case(model, "LoraConfig", {"r": 4, "lora_alpha": 8, **task, **options})


def prompt(model: str, **options: Any) -> Case:
    task = {"t5": SEQ2SEQ, "bert": CLASSES}.get(model, CAUSAL)
    return Case(model, "PromptTuningConfig", {"num_virtual_tokens": 3, **task, **options})


def prefix(model: str, **options: Any) -> Case:
    task = {"t5": SEQ2SEQ, "bert": CLASSES}.get(model, CAUSAL)
    return Case(model, "PrefixTuningConfig", {"num_virtual_tokens": 3, **task, **options})


def other(model: str, config: str, **options: Any) -> Case:
    task = {"t5": SEQ2SEQ, "bert": CLASSES, "plain": {}}.get(model, CAUSAL)
    return Case(model, config, {**task, **options})


CASES = {
    "llama-lora": lora("llama"),
    "llama-all-linear": lora("llama", target_modules="all-linear"),
    "llama-regex": lora("llama", target_modules=r".*layers\.1\..*(q|down)_proj"),
    "llama-excluded": lora("llama", target_modules=["q_proj", "up_proj"], exclude_modules=["layers.0.mlp.up_proj"]),
    "llama-layers": lora("llama", target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"),
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
    "llama-lora-tokens": lora("llama", trainable_token_indices=[3, 7, 20]),
    "gpt2-lora-tokens": lora("gpt2", trainable_token_indices={"wte": [3, 7, 20]}),
    "bert-lora": lora("bert"),
    "plain-conv": lora("plain", target_modules=["conv", "embed", "first"]),
    "plain-bias": lora("plain", target_modules=["conv", "first"], bias="all"),
    "llama-dora": lora("llama", use_dora=True, target_modules="all-linear"),
    "gpt2-dora": lora("gpt2", use_dora=True, bias="lora_only"),
    "t5-dora": lora("t5", use_dora=True),
    "plain-dora": lora("plain", use_dora=True, target_modules=["conv", "embed", "first"]),
    "llama-ia3": other("llama", "IA3Config"),
    "gpt2-ia3": other("gpt2", "IA3Config"),
    "t5-ia3": other("t5", "IA3Config"),
    "bloom-ia3": other("bloom", "IA3Config"),
    "bert-ia3": other("bert", "IA3Config", target_modules=["key", "value"], feedforward_modules=[]),
    "plain-ia3": other("plain", "IA3Config", target_modules=["first", "second"], feedforward_modules=["second"]),
    "llama-ln": other("llama", "LNTuningConfig"),
    "gpt2-ln": other("gpt2", "LNTuningConfig"),
    "t5-ln": other("t5", "LNTuningConfig"),
    "llama-fourierft": other("llama", "FourierFTConfig", n_frequency=40, n_frequency_pattern={"v_proj": 7}),
    "gpt2-fourierft": other("gpt2", "FourierFTConfig", n_frequency=40, target_modules=["c_attn", "c_fc"], scaling=20.0),
    "t5-fourierft": other("t5", "FourierFTConfig", n_frequency=40, random_loc_seed=5),
    "plain-fourierft": other("plain", "FourierFTConfig", n_frequency=40, target_modules=["first"]),
    # its gradient with respect to the input is wrong in theirs, so that adapters further down get others: one layer
    "llama-c3a": other("llama", "C3AConfig", block_size=8, block_size_pattern={"v_proj": 4}, layers_to_transform=[1]),
    "t5-c3a": other("t5", "C3AConfig", block_size=8, target_modules=r"decoder\.block\.1\..*\.wi"),
    "llama-shira": other("llama", "ShiraConfig", r=2, random_seed=3),
    "t5-shira": other("t5", "ShiraConfig", r=2),
    "llama-beft": other("llama", "BeftConfig"),
    "t5-beft": other("t5", "BeftConfig"),
    "bert-beft": other("bert", "BeftConfig"),
    "llama-adalora": other("llama", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, lora_alpha=3),
    "gpt2-adalora": other("gpt2", "AdaLoraConfig", total_step=9, init_r=4, target_r=2),
    "t5-adalora": other("t5", "AdaLoraConfig", total_step=9, init_r=4, target_modules=["q", "wi"], target_r=2),
    "plain-adalora": other("plain", "AdaLoraConfig", total_step=9, init_r=4, target_r=2, target_modules=["first"]),
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
    "llama-prefix": prefix("llama"),
    "gpt2-prefix": prefix("gpt2"),
    "bert-prefix": prefix("bert"),
    "llama-projected": prefix("llama", prefix_projection=True, encoder_hidden_size=20),
    "gpt2-projected": prefix("gpt2", prefix_projection=True),
}
if importlib.util.find_spec("sklearn") is not None:  # which theirs needs
    CASES |= {
        "llama-adamss": other("llama", "AdamssConfig", r=8, num_subspaces=3),
        "llama-adamss-ranks": other("llama", "AdamssConfig", r=6, subspace_rank=2, use_dynamic_rank=True),
        "bert-adamss": other("bert", "AdamssConfig", r=8, random_seed=2),
        "t5-adamss": other("t5", "AdamssConfig", r=8, target_modules=["q", "wi"]),
    }
"""That both libraries take with the same options; T5's prefix stands below."""


def field_logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    """Of the field's model, which returns those of virtual tokens too."""
    tokens = ids() if tokens is None else tokens
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


def field_loaded(base: nn.Module, folder: Path) -> Any:
    """Loaded by the field's library, which must not miss a key or meet a field that it does not know."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, folder).eval()
    told = [str(w.message) for w in seen]
    assert not [t for t in told if "missing adapter keys" in t or "Unexpected keyword" in t], told
    return model


def gradients_as_stored(view: PeftModel) -> dict[str, Tensor]:
    """Gradients of the adapter "default" by the keys of files, in the layout of files.

    Layouts are linear in what they hold, so gradients are laid out as values are.
    """
    adapter = view.get_adapter("default")
    values = {p: p.data for p in adapter.parameters()}
    for parameter in values:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    stored = {entry.key: entry.read().clone() for entry in entries(adapter, view.base)}
    for parameter, value in values.items():
        parameter.data = value
    return stored


def field_gradients(model: Any) -> dict[str, Tensor]:
    """The same of a model of the field's library."""
    values = {p: p.data for p in model.parameters() if p.requires_grad}
    for parameter in values:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    stored = {k: v.clone() for k, v in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    for parameter, value in values.items():
        parameter.data = value
    return stored


def far(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())
