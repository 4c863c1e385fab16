"""A whole model of Llama's or GPT-2's shape, with its tokenizer, as one GGUF file."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.layer import kind_of
from ...core.roles import word_embeddings
from ...core.tied import weights
from . import tokenizer as tokenizers
from .names import Family, Names, family_of, ordered, package
from .reading import compare

KINDS = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}
"""The base's dtype -> what the file's matrices are, and what the file is called. Vectors are always float32."""
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel")
Q8 = ("Q8_0", "MOSTLY_Q8_0")
BLOCK = 32
"""Numbers of a row that have a scale in common in Q8_0."""


def check(base: Any, tokenizer: Any) -> None:
    """Raises ValueError where such a model, or its tokenizer, cannot be written as GGUF."""
    package()
    family = family_of(base, whole=True)
    config = base.config
    if type(base).__name__ not in CLASSES:
        raise ValueError(f"GGUF files are written of language models; this is a {type(base).__name__}.")
    if wrong := _strange_gpt2(config) if family.arch == "gpt2" else _strange_llama(config):
        raise ValueError(f"llama.cpp computes {config.model_type} models otherwise: {wrong}.")
    tokenizers.check(tokenizer, len(word_embeddings(base)[0].get_parameter("weight")))


def _strange_llama(config: Any) -> str:
    rope = config.rope_parameters or {}
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act!r}, not 'silu'"
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return f"rope_type is {rope['rope_type']!r}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"sliding_window is {config.sliding_window}"
    return ""


def _strange_gpt2(config: Any) -> str:
    if config.activation_function != "gelu_new":
        return f"activation_function is {config.activation_function!r}, not 'gelu_new'"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "its attention scores are scaled in another way"
    return ""


def write(base: Any, tokenizer: Any, file: Path, name: str, quantise: bool = False) -> None:
    """Writes `base` as it stands, and reads the file back.

    Args:
        quantise: matrices whose rows are a multiple of 32 long, as 8-bit blocks (Q8_0).
    """
    gguf, family = package(), family_of(base, whole=True)
    writer = gguf.GGUFWriter(file, family.arch)
    writer.add_name(name)
    (_describe_gpt2 if family.arch == "gpt2" else _describe_llama)(writer, base)
    kind, whole = Q8 if quantise else KINDS[base.dtype]
    writer.add_file_type(gguf.LlamaFileType[whole])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tokenizers.add(writer, tokenizer, len(word_embeddings(base)[0].get_parameter("weight")))
    meant: dict[str, np.ndarray] = {}
    for key, values in tensors(base, family).items():
        fits = values.ndim == 2 and (not quantise or values.shape[-1] % BLOCK == 0)
        stored = gguf.GGMLQuantizationType[kind if fits else "F32"]
        packed = gguf.quantize(values, stored)
        writer.add_tensor(key, packed, raw_dtype=None if stored.name in ("F32", "F16") else stored)
        meant[key] = gguf.dequantize(packed, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(file, meant)


@torch.no_grad()
def rounded(base: Any) -> Any:
    """A copy of `base` with its weights as a quantised file holds them."""
    gguf = package()
    kind = gguf.GGMLQuantizationType[Q8[0]]
    copied: Any = copy.deepcopy(base)
    for module in copied.modules():
        for key, value in module.named_parameters(recurse=False):
            rows = _by_output(module, key, value)
            if rows.dim() == 2 and rows.shape[-1] % BLOCK == 0:
                # In which order the rows stand changes nothing: each has scales of its own.
                off = torch.from_numpy(gguf.dequantize(gguf.quantize(_array(rows), kind), kind))
                value.copy_(_by_output(module, key, off))
    return copied


def tensors(base: Any, family: Family) -> dict[str, np.ndarray]:
    """By llama.cpp's names, in its order of rows, (O, I) for matrices; a tied head is left out."""
    names = Names(family, base.config.num_hidden_layers)
    words = word_embeddings(base)
    held = weights(base, words)
    tied = len(words) == 2 and held[words[0]] is held[words[1]]
    found: dict[str, np.ndarray] = {}
    for path, module in base.named_modules():
        if tied and module is words[1]:
            continue
        for key, value in module.named_parameters(recurse=False):
            whole = f"{path}.{key}"
            found[names(whole)] = ordered(_array(_by_output(module, key, value)), whole, family, base.config)
    if family.arch != "gpt2" and (factors := _rope_factors(base)) is not None:
        found["rope_freqs.weight"] = factors
    return found


def _by_output(module: nn.Module, key: str, value: Tensor) -> Tensor:
    """(O, I) of a linear layer, which GPT-2's have the other way round, and back; (V, D) of an embedding."""
    kind = kind_of(module)
    return kind.canonical(value) if key == "weight" and kind is not None and kind.name == "linear" else value


def _rope_factors(base: Any) -> np.ndarray | None:
    """By what each frequency of the rotary embedding is divided; None where none is."""
    config, rotary = base.config, base.model.rotary_emb
    size = _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors = plain / rotary.inv_freq.double().cpu()
    return None if torch.allclose(factors, torch.ones_like(factors), atol=1e-5) else _array(factors)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _describe_llama(writer: Any, base: Any) -> None:
    config = base.config
    _sizes(writer, config, config.max_position_embeddings, config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(_head_dim(config))


def _describe_gpt2(writer: Any, base: Any) -> None:
    config = base.config
    _sizes(writer, config, config.n_positions, config.n_inner or 4 * config.n_embd)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _sizes(writer: Any, config: Any, positions: int, inner: int) -> None:
    writer.add_context_length(positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())
