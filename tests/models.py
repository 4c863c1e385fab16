"""Small random models of every family that must work. All weights are made here; nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
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


def plain() -> Plain:
    torch.manual_seed(0)
    return Plain().eval().requires_grad_(False)


def _made(cls: Any, config: Any) -> Any:
    """Frozen already: whether weights need gradients decides which attention kernel PyTorch takes."""
    torch.manual_seed(0)
    return cls(config).eval().requires_grad_(False)


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "gpt2": gpt2, "bloom": bloom, "t5": t5, "bert": bert}


def ids(rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    """(rows, length) token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, tokens: Tensor | None = None, **options: Any) -> Tensor:
    """What a model (or a view) gives for tokens; an encoder-decoder gets the first five as its decoder's input."""
    tokens = ids() if tokens is None else tokens
    if not hasattr(model, "config"):
        return model(tokens, **options)
    if model.config.is_encoder_decoder:
        options = {"decoder_input_ids": tokens[:, :5], **options}
    return model(input_ids=tokens, **options).logits


def stir(adapters: nn.Module, seed: int = 1, by: float = 0.1) -> None:
    """Moves all parameters of adapters away from their start, so that they have an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter))
