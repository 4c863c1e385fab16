"""LoRA, DoRA and (IA)^3, which is a LoRA there that scales."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...config import PeftConfig
from ...core.adapter import Adapter
from ...methods.dora import DoRA
from ...methods.ia3 import IA3, IA3Config
from ...methods.lora import LoraConfig
from .tensors import Fill, Tensors, copy


def read(config: Mapping[str, Any], tensors: Tensors, base: Any) -> tuple[PeftConfig, Fill]:
    paths = tensors.paths("loras")
    if config.get("composition_mode") == "scale":
        return _ia3(config, tensors, base)
    ranks = {path: len(tensors.by_place["loras", path, "lora_A"]) for path in paths}
    usual = max(ranks.values())
    scale = config["alpha"] / config["r"]
    made = LoraConfig(
        r=usual,
        lora_alpha=scale * usual,
        lora_dropout=config.get("dropout", 0.0),
        target_modules=paths,
        use_dora=bool(config.get("use_dora")),
        rank_pattern={f"^{re.escape(path)}$": r for path, r in ranks.items() if r != usual},
        alpha_pattern={f"^{re.escape(path)}$": scale * r for path, r in ranks.items() if r != usual},
    )

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            path, method = part.place.path, part.method
            low: Any = method.change if isinstance(method, DoRA) else method
            a, b = (tensors.take("loras", path, f"lora_{n}") for n in "AB")
            if isinstance(method, DoRA):
                method.m.copy_(tensors.take("loras", path, "m.weight").view(method.m.shape))
            copy(a, low.A, path)
            copy(b if b.shape[1] == len(a) else _block_diagonal(config, b, len(a), len(low.B)), low.B, path)

    return made, fill


def _of_merged(config: Mapping[str, Any]) -> list[int]:
    """Which thirds of a layer that makes queries, keys and values at once are adapted."""
    return ["qkv".index(name) for name in sorted(config["attn_matrices"], key="qkv".index)]


def _block_diagonal(config: Mapping[str, Any], b: Tensor, ranks: int, outputs: int) -> Tensor:
    """B of several thirds on top of each other -> one matrix, each third with columns of its own."""
    at = _of_merged(config)
    width, r = outputs // 3, ranks // len(at)
    whole = b.new_zeros(outputs, ranks)
    for n, (third, own) in enumerate(zip(at, b.chunk(len(at)), strict=True)):
        whole[third * width : (third + 1) * width, n * r : (n + 1) * r] = own
    return whole


def _ia3(config: Mapping[str, Any], tensors: Tensors, base: Any) -> tuple[PeftConfig, Fill]:
    made = IA3Config(target_modules=tensors.paths("loras"), feedforward_modules=[])

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            assert isinstance(part.method, IA3)
            own, factors = tensors.take("loras", part.place.path, "lora_B").flatten() * config["alpha"], part.method.l
            if own.shape != factors.shape:
                whole = torch.ones(3, len(factors) // 3).to(own)
                for third, some in zip(_of_merged(config), own.chunk(len(_of_merged(config))), strict=True):
                    whole[third] = some
                own = whole.flatten()
            copy(own, factors, part.place.path)

    return made, fill
