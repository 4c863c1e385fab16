"""What llama.cpp calls a model's tensors, and how it orders the rows of queries and keys."""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...versions import need


@dataclass(frozen=True)
class Family:
    """One of llama.cpp's architectures."""

    arch: str
    pairs: bool = False
    """Whether rotary embedding turns neighbours (2i, 2i + 1), where transformers turns (i, i + D/2)."""
    whole: bool = False
    """Whether whole models of it are written here; else adapters only."""


FAMILIES = {
    "llama": Family("llama", pairs=True, whole=True),
    "mistral": Family("llama", pairs=True, whole=True),
    "qwen2": Family("qwen2", whole=True),
    "qwen3": Family("qwen3", whole=True),
    "gemma2": Family("gemma2"),
    "gemma3_text": Family("gemma3"),
    "gpt2": Family("gpt2", whole=True),
}
"""By transformers' model_type."""


def package() -> Any:
    """The `gguf` package. Raises ImportError with the one line that installs it."""
    need("GGUF files", "gguf")
    return importlib.import_module("gguf")


def family_of(base: Any, whole: bool) -> Family:
    """Raises ValueError where no file of this model can be written."""
    kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    found = FAMILIES.get(kind)
    known = [name for name, family in FAMILIES.items() if family.whole or not whole]
    if found is None or (whole and not found.whole):
        what = "Whole models" if whole else "Adapters"
        rest = (
            "Write the merged model for transformers (--for transformers --merged) and convert it with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
        raise ValueError(f"{what} are written as GGUF for {', '.join(known)}; this is a {kind} model. {rest}")
    return found


class Names:
    """Names of tensors of one model."""

    def __init__(self, family: Family, layers: int) -> None:
        package_ = package()
        arch = next(a for a, name in package_.MODEL_ARCH_NAMES.items() if name == family.arch)
        self._map = package_.get_tensor_name_map(arch, layers)

    def __call__(self, key: str) -> str:
        """Of a parameter `…weight` or `…bias`. Raises ValueError where llama.cpp has none like it."""
        found = self._map.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"llama.cpp has no tensor for {key!r} in this architecture.")
        return found


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """(heads * D, …) from halves to neighbours: rows i and i + D/2 of each head come to stand at 2i and 2i + 1."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def ordered(rows: np.ndarray, key: str, family: Family, config: Any) -> np.ndarray:
    """Output rows of the layer that `key` belongs to, as llama.cpp has them."""
    if not family.pairs:
        return rows
    layer = key.rpartition(".")[0].rpartition(".")[2]
    match layer:
        case "q_proj":
            return in_pairs(rows, config.num_attention_heads)
        case "k_proj":
            return in_pairs(rows, config.num_key_value_heads)
        case _:
            return rows
