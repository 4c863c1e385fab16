"""How far what was written is from what was to be written, on inputs that the model makes itself."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROWS, TOKENS = 4, 24
"""Of the inputs that are tried."""
Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The logits of two models on the same inputs."""

    share: float
    """|other - meant| / |meant - base|, the part of what the adapters change that is off; nan where that is none."""
    largest: float
    """The largest difference of two logits."""
    places: int
    """Tokens, or pictures, that were tried."""
    same: int
    """Places with the same likeliest answer."""

    def __str__(self) -> str:
        return (
            f"the logits are off by {self.largest:.2g} at most, {100 * self.share:.2g} % of what the adapters change; "
            f"the likeliest answer is the same at {self.same} of {self.places} places"
        )


def drift(meant: Any, other: Any, base: Any) -> Drift:
    """Of logits (B, T, V) or (B, classes), as tensors or arrays."""
    meant, other, base = (
        torch.as_tensor(np.asarray(x.float()) if isinstance(x, Tensor) else x) for x in (meant, other, base)
    )
    change = float((meant - base).norm())
    off = other - meant
    same = meant.argmax(-1) == other.argmax(-1)
    share = float(off.norm()) / change if change else float("nan")
    return Drift(share=share, largest=float(off.abs().max()), places=same.numel(), same=int(same.sum()))


@torch.no_grad()
def samples(view: Any, seed: int = 0) -> Inputs | None:
    """Inputs for the base of a view: texts that a language model draws itself, random tokens or pictures for others.

    None for a model whose inputs are not known.
    """
    base = view.get_base_model()
    config, takes = getattr(base, "config", None), inspect.signature(base.forward).parameters
    draw = torch.Generator().manual_seed(seed)
    device = next(base.parameters()).device
    if config is None:
        return None
    if "pixel_values" in takes and "input_ids" not in takes:
        size = getattr(config, "image_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        pictures = torch.randn(ROWS, getattr(config, "num_channels", 3), *sides, generator=draw)
        return {"pixel_values": pictures.to(device, next(base.parameters()).dtype)}
    if "input_ids" not in takes:
        return None
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=draw).to(device)
    if base.can_generate() and not config.is_encoder_decoder:
        ids = _drawn(base, ids[:, :1], seed)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        found["decoder_input_ids"] = ids.flip(1)[:, : TOKENS // 2].contiguous()
    return found


def _drawn(base: Any, ids: Tensor, seed: int) -> Tensor:
    """Texts that begin with `ids`, as likely as the model finds them. An end does not end them."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(TOKENS - 1):
        scores = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        likely = scores.float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(likely, 1, generator=draw).to(ids.device)], 1)
    return ids


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Tensor:
    """On the CPU, in float32."""
    return model(**inputs, **options).logits.float().cpu()
