"""diffusers' files: `unet.….to_q.lora_A.weight`, and older ones, `….attn1.processor.to_q_lora.down.weight`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .layers import LORA, Parts, add, checked, only_lora

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_OLDER = (
    (re.compile(r"\.processor\.to_out_lora\.(down|up)\.weight$"), r".to_out.0.\1"),
    (re.compile(r"\.processor\.(\w+)_lora\.(down|up)\.weight$"), r".\1.\2"),
    (re.compile(r"\.to_out_lora\.(down|up)\.weight$"), r".to_out.0.\1"),
    (re.compile(r"\.(\w+)_lora\.(down|up)\.weight$"), r".\1.\2"),
    (re.compile(r"\.(?:lora_linear_layer|lora)\.(down|up)\.weight$"), r".\1"),
)
"""Keys before diffusers took the field's names -> path and half."""
_HALVES = {"down": LORA[0], "up": LORA[1]}
METADATA = "lora_adapter_metadata"


def is_one(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are keys of such a file."""
    return bool(tensors) and all(key.partition(".")[0] in PARTS for key in tensors)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Parts:
    """Raises ValueError for keys that are no LoRA's."""
    parts: Parts = {}
    for key, tensor in tensors.items():
        part, _, inside = key.partition(".")
        path, name = _split(inside)
        add(parts, part, path, name, tensor)
    told: dict[str, Any] = json.loads(metadata.get(METADATA, "{}"))
    for part, modules in parts.items():
        for path, changed in modules.items():
            if changed.alpha is None and (alpha := _told(told, part, path, changed.rank)) is not None:
                changed.alpha = alpha
    return checked(parts)


def _split(key: str) -> tuple[str, str]:
    for end in (*LORA, "lora_magnitude_vector", "alpha"):
        if key.endswith(f".{end}"):
            return key.removesuffix(f".{end}"), end
    if key.endswith(".lora_magnitude_vector.weight"):
        return key.removesuffix(".lora_magnitude_vector.weight"), "lora_magnitude_vector"
    for pattern, new in _OLDER:
        if pattern.search(key):
            path, _, half = pattern.sub(new, key).rpartition(".")
            return path, _HALVES[half]
    raise ValueError(f"{key!r} is not read: of diffusers' files LoRA and DoRA are.")


def _told(told: Mapping[str, Any], part: str, path: str, rank: int | None) -> float | None:
    """lora_alpha of the configuration that newer files hold, each field with the part's name in front."""

    def said(name: str) -> Any:
        return told.get(f"{part}.{name}")

    if (alpha := said("lora_alpha")) is None:
        return None
    pattern: Mapping[str, float] = said("alpha_pattern") or {}
    alpha = next((a for p, a in pattern.items() if re.match(rf"(.*\.)?({p})$", path)), alpha)
    return float(alpha) * (rank or 1) ** 0.5 if said("use_rslora") else float(alpha)


def write(parts: Parts) -> dict[str, Tensor]:
    """The tensors of one file, with every scale in B: what diffusers assumes where nothing is said."""
    only_lora(parts, "diffusers")
    if strange := [part for part in parts if part not in PARTS]:
        raise ValueError(f"diffusers' pipelines have no part {strange[0]!r}; they have {', '.join(PARTS)}.")
    out: dict[str, Tensor] = {}
    for part, modules in parts.items():
        for path, changed in modules.items():
            if path.startswith(("input_blocks.", "middle_block.", "output_blocks.")):
                raise ValueError(
                    f"{path!r} is a name of the original Stable Diffusion code, which diffusers calls otherwise. Load "
                    "the file there with load_lora_weights, and save it."
                )
            for name, tensor in zip(LORA, changed.folded(), strict=True):
                out[f"{part}.{path}.{name}"] = tensor
    return out
