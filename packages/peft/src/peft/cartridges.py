"""Cartridges as tensors and files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from coadapt import CartridgeConfig
from coadapt.config import PeftConfig
from coadapt.core.adapter import replace_options
from coadapt.formats.files import WEIGHTS

from .configs import _write
from .state import load_peft_weights

_SAME = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """(N, layers 2 H D) the first N keys and values of a cache of one row, as a prefix's file holds them.

    Raises:
        ValueError: the cache has several rows, or fewer tokens.
    """
    layers = getattr(past_key_values, "layers", None)
    pairs = [tuple(pair)[:2] for pair in past_key_values] if layers is None else [(c.keys, c.values) for c in layers]
    for tensor in (t for pair in pairs for t in pair):  # (1, H, S, D)
        if len(tensor) != 1 or tensor.shape[2] < num_virtual_tokens:
            raise ValueError(
                f"One row of at least {num_virtual_tokens} tokens is needed; there is {tuple(tensor.shape)}."
            )
    both = torch.stack([t[0, :, :num_virtual_tokens] for pair in pairs for t in pair])  # (layers 2, H, N, D)
    return both.permute(2, 0, 1, 3).flatten(1)


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Writes one cartridge that is several, one after the other; of the first, the frozen tokens stay frozen.

    Raises:
        ValueError: fewer than two, another method, cartridges of unlike models, or a pickle is asked for.
    """
    if not safe_serialization:
        raise ValueError("safe_serialization=False asks for a pickle; coadapt writes safetensors only.")
    configs: list[Any] = [PeftConfig.from_pretrained(path) for path in adapter_paths]  # type: ignore[arg-type]
    if len(configs) < 2 or not all(isinstance(config, CartridgeConfig) for config in configs):
        raise ValueError(f"At least two cartridges are needed; got {[type(c).__name__ for c in configs]}.")
    for name in _SAME:
        if len({getattr(config, name) for config in configs}) > 1:
            raise ValueError(f"These cartridges are of unlike models: {name} is {[getattr(c, name) for c in configs]}.")
    joined = torch.cat([load_peft_weights(path)["prompt_embeddings"] for path in adapter_paths])
    _write(replace_options(configs[0], num_virtual_tokens=len(joined)), output_path)
    save_file({"prompt_embeddings": joined}, str(Path(output_path) / WEIGHTS))
