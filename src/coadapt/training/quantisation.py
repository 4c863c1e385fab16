"""Bases that are quantised by bitsandbytes as they are loaded: QLoRA, Dettmers et al. 2023, arXiv:2305.14314."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from coadapt.versions import need


def quantised_loading(
    model: str, told: Mapping[str, Any], *, dtype: str, revision: str | None, device: torch.device | None
) -> dict[str, Any]:
    """Options of `from_pretrained` that quantise a base as `told`, by the names of BitsAndBytesConfig.

    Args:
        dtype: that the base is loaded in, which layers of 4 bits multiply in if nothing else is told.

    Raises:
        ValueError: there is no bitsandbytes, or the base is saved quantised.
    """
    need("Bases that are quantised as they are loaded", "bitsandbytes")
    config = AutoConfig.from_pretrained(model, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        how = " and ".join(name for name in told if name.startswith("load_in"))
        raise ValueError(f"model={model!r} is quantised already, as it is saved. Leave {how} out.")
    if told.get("load_in_4bit") and "bnb_4bit_compute_dtype" not in told:
        loaded = getattr(config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
        told = {**told, "bnb_4bit_compute_dtype": loaded or torch.float32}
    options: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**told)}
    return options if device is None else {**options, "device_map": {"": device}}
