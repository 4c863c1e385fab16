"""Small random models of every family that must work. All weights are made here; nothing is downloaded."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY = 64
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**options: Any) -> LlamaForCausalLM:
    """Grouped-query attention, rotary positions, RMSNorm, no biases."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return _made(
        LlamaForCausalLM,
        LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, "max_position_embeddings": 128, **_TOKENS, **options}),
    )


def gpt2(**options: Any) -> GPT2LMHeadModel:
    """Conv1D layers, learned positions, tied head, biases."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _made(GPT2LMHeadModel, GPT2Config(**{"vocab_size": VOCABULARY, **sizes, **quiet, **_TOKENS, **options}))


def bloom(**options: Any) -> BloomForCausalLM:
    """Alibi, and an attention of its own, without transformers' interface."""
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return _made(BloomForCausalLM, BloomConfig(**{"vocab_size": VOCABULARY, **sizes, **_TOKENS, **options}))


def t5(**options: Any) -> T5ForConditionalGeneration:
    """Encoder-decoder, relative positions; d_kv * heads is not d_model."""
    sizes = {"d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return _made(T5ForConditionalGeneration, T5Config(**{"vocab_size": VOCABULARY, **sizes, **tokens, **options}))


def bert(**options: Any) -> BertForSequenceClassification:
    """An encoder with a pooler and a classifier."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "num_labels": 3,
    }
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _made(BertForSequenceClassification, BertConfig(**{"vocab_size": VOCABULARY, **sizes, **quiet, **options}))


def opt(**options: Any) -> OPTForCausalLM:
    """Learned positions counted from 2 and read off the mask, biases, an input as wide as the layers."""
    sizes = {"hidden_size": 32, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0}
    wide = {"word_embed_proj_dim": 32, "max_position_embeddings": 128}
    return _made(OPTForCausalLM, OPTConfig(**{"vocab_size": VOCABULARY, **sizes, **wide, **_TOKENS, **options}))


def bart(**options: Any) -> BartForConditionalGeneration:
    """Encoder-decoder, learned positions, biases, embeddings with a scale, layers that end in a norm."""
    one = {"layers": 2, "attention_heads": 4, "ffn_dim": 40}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in one.items()}
    own = {"d_model": 32, "dropout": 0.0, "max_position_embeddings": 128, "scale_embedding": True, "init_std": 0.1}
    tokens = {**_TOKENS, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    return _made(
        BartForConditionalGeneration, BartConfig(**{"vocab_size": VOCABULARY, **sizes, **own, **tokens, **options})
    )


def whisper(**options: Any) -> WhisperForConditionalGeneration:
    """An encoder of audio features behind two convolutions, and a decoder of tokens; keys have no bias."""
    one = {"layers": 2, "attention_heads": 4, "ffn_dim": 40}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in one.items()}
    own = {"d_model": 32, "num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 128, "dropout": 0.0}
    tokens = {**_TOKENS, "decoder_start_token_id": 1, "begin_suppress_tokens": None}
    return _made(
        WhisperForConditionalGeneration,
        WhisperConfig(**{"vocab_size": VOCABULARY, **sizes, **own, **tokens, **options}),
    )


def vit(**options: Any) -> ViTForImageClassification:
    """Images: patches by a convolution, a class token, an encoder, a classifier."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    image = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _made(ViTForImageClassification, ViTConfig(**{**sizes, **image, **quiet, **options}))


_NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
}
"""Heads that together are not as wide as the hidden states."""


def gemma2(**options: Any) -> Gemma2ForCausalLM:
    """Soft caps on scores and logits, a sliding window in every other layer, scaled embeddings, norms behind parts."""
    own = {"query_pre_attn_scalar": 6, "sliding_window": 4, "attn_implementation": "eager"}
    return _made(Gemma2ForCausalLM, Gemma2Config(**{"vocab_size": VOCABULARY, **_NARROW, **own, **_TOKENS, **options}))


def gemma3(**options: Any) -> Gemma3ForCausalLM:
    """Normed queries and keys, one head of keys and values, a sliding window and rotary positions of its own there."""
    own = {"query_pre_attn_scalar": 6, "sliding_window": 4, "num_key_value_heads": 1}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    return _made(
        Gemma3ForCausalLM,
        Gemma3TextConfig(**{"vocab_size": VOCABULARY, **_NARROW, **own, **kinds, **_TOKENS, **options}),
    )


def qwen2(**options: Any) -> Qwen2ForCausalLM:
    """Biases at queries, keys and values only."""
    sizes = {k: v for k, v in _NARROW.items() if k != "head_dim"}
    return _made(Qwen2ForCausalLM, Qwen2Config(**{"vocab_size": VOCABULARY, **sizes, **_TOKENS, **options}))


def qwen3(**options: Any) -> Qwen3ForCausalLM:
    """Normed queries and keys, no biases."""
    return _made(Qwen3ForCausalLM, Qwen3Config(**{"vocab_size": VOCABULARY, **_NARROW, **_TOKENS, **options}))


def mixtral(**options: Any) -> MixtralForCausalLM:
    """A mixture of experts: their weights are 3-D parameters without layers, and so is the router's matrix."""
    sizes = {k: v for k, v in _NARROW.items() if k != "head_dim"}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _made(
        MixtralForCausalLM, MixtralConfig(**{"vocab_size": VOCABULARY, **sizes, **experts, **_TOKENS, **options})
    )


class Plain(nn.Module):
    """No transformers model: an embedding, a convolution, linear layers, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        h = h + self.conv(h.mT).mT
        return self.head(self.norm(h + self.second(torch.relu(self.first(h)))))


class Convolutions(nn.Module):
    """No transformers model, and no layer that is linear but the head: images, statistics of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 5)
        self.norm.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.second(torch.relu(self.norm(self.first(pixel_values))))
        return self.head(torch.tanh(self.hidden(torch.tanh(h).flatten(2).mean(-1))))


class Volumes(nn.Module):
    """No transformers model: convolutions of volumes, in which a picture is stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 12, (1, 3, 2), stride=2, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(pixel_values.view(-1, 3, 4, 4, 4))))
        return self.head(torch.tanh(h).flatten(2).mean(-1))


class Holder(nn.Module):
    """One layer as a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval().requires_grad_(False)


def conv() -> Convolutions:
    torch.manual_seed(0)
    return Convolutions().eval().requires_grad_(False)


def volumes() -> Volumes:
    torch.manual_seed(0)
    return Volumes().eval().requires_grad_(False)


def _made(cls: Any, config: Any) -> Any:
    """Frozen already: whether weights need gradients decides which attention kernel PyTorch takes."""
    torch.manual_seed(0)
    return cls(config).eval().requires_grad_(False)


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "gpt2": gpt2, "bloom": bloom, "t5": t5, "bert": bert}
FAMILIES: dict[str, Callable[..., Any]] = {
    "opt": opt, "bart": bart, "whisper": whisper, "vit": vit, "gemma2": gemma2, "gemma3": gemma3, "qwen2": qwen2,
    "qwen3": qwen3, "mixtral": mixtral,
}  # fmt: skip
"""Further families of transformers' models, which the laws hold for as well."""


def ids(rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    """(rows, length) token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def picture(tokens: Tensor) -> Tensor:
    """(rows, 3, 8, 8) made of a row's tokens, whatever their number."""
    return _signal(tokens, 3 * 8 * 8).view(-1, 3, 8, 8)


def sound(tokens: Tensor) -> Tensor:
    """(rows, 6, 16): bands of frequencies, made of a row's tokens."""
    return _signal(tokens, 6 * 16).view(-1, 6, 16)


def _signal(tokens: Tensor, size: int) -> Tensor:
    at = torch.arange(size)
    return torch.sin(tokens[:, at % tokens.shape[1]] * (1 + at / 7))


def logits(model: Any, tokens: Tensor | None = None, **options: Any) -> Tensor:
    """What a model (or a view) gives for tokens, or for images or sounds that are made of them.

    An encoder-decoder gets the first five as its decoder's input.
    """
    tokens = ids() if tokens is None else tokens
    takes = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters  # of what is compiled, too
    if "pixel_values" in takes:
        out = model(pixel_values=picture(tokens).to(next(model.parameters()).dtype), **options)
        return out if isinstance(out, Tensor) else out.logits
    if not hasattr(model, "config"):
        return model(tokens, **options)
    if model.config.is_encoder_decoder:
        options = {"decoder_input_ids": tokens[:, :5], **options}
    if "input_features" in takes:
        return model(input_features=sound(tokens).to(next(model.parameters()).dtype), **options).logits
    return model(input_ids=tokens, **options).logits


def stir(adapters: nn.Module, seed: int = 1, by: float = 0.1) -> None:
    """Moves all parameters of adapters away from their start, so that they have an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))
