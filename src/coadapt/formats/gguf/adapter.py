"""A LoRA as a GGUF file, for llama.cpp's --lora."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...core.adapter import Adapter
from ...core.roles import word_embeddings
from ...methods.lora import LoRA
from .names import Names, family_of, ordered, package
from .reading import compare


def check(base: Any) -> None:
    """Raises ValueError where no adapter for such a model can be written, or the `gguf` package is missing."""
    package()
    family_of(base, whole=False)


def write(adapter: Adapter, base: Any, file: Path, name: str) -> None:
    """Writes a plain LoRA, one rank and alpha for all of it, and reads it back.

    llama.cpp computes (alpha / R) B (A x) with A `[R, I]`, B `[O, R]`; at the embedding it has A as `[V, R]`.

    Raises:
        ValueError: llama.cpp has no tensor for a layer; nothing was written.
    """
    family = family_of(base, whole=False)
    tensors, alpha = _tensors(adapter, base)
    gguf = package()
    writer = gguf.GGUFWriter(file, family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    for key, values in tensors.items():
        writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(file, tensors)


def _tensors(adapter: Adapter, base: Any) -> tuple[dict[str, np.ndarray], float]:
    """What the file holds, and alpha. Layers where nothing changes are left out."""
    names, family = Names(family_of(base, whole=False), base.config.num_hidden_layers), family_of(base, whole=False)
    embedding = word_embeddings(base)[0]
    found: dict[str, np.ndarray] = {}
    alpha = 0.0
    for part in adapter.parts:
        assert isinstance(part.method, LoRA)
        a, b, scale = part.method.factors()
        alpha = scale * a.shape[0]
        if not b.any() or not a.any():
            continue
        key = f"{part.place.path}.weight"
        up = ordered(_array(b), key, family, base.config)
        found[f"{names(key)}.lora_a"] = _array(a.mT if part.place.module is embedding else a)
        found[f"{names(key)}.lora_b"] = up
    return found, alpha


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())
