"""Models of a few thousand parameters, and what gives an adapter values that do something."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers, in evaluation mode; the same for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def moved(module: nn.Module) -> None:
    """Moves what trains away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
