from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core.attention import joinable
from ..core.layer import Layer
from ..core.method import AttentionMethod, Place, register
from ..core.roles import PROJECTIONS, Attention


@dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """A learned prompt that the top layers attend to beside their input, through a gate that starts at zero."""

    kind = "ADAPTION_PROMPT"

    adapter_len: int
    """N, the tokens of each layer's prompt."""
    adapter_layers: int
    """How many layers have one, counted from the top."""
    target_modules: str | None = None
    """What the attention modules are called, where a model has several kinds; left out, they are found."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("adapter_len", "adapter_layers")


@register(AdaptionPromptConfig)
class AdaptionPrompt(AttentionMethod):
    """attention(q, k, v) + g softmax(q K^T) V with K = W_k P, V = W_v P

    LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, Zhang et al. 2023,
    arXiv:2303.16199. W_k and W_v are the layer's own, frozen; K has no positions; g is one number for each layer and 0
    at the start. As in the field's files, what is added in GPT-2 does not go through the projection that ends the
    attention. Different from there: any model whose attention a prefix can join; where that projection has a bias, it
    is added once. Use it for instructions on few parameters, beside a base that must not move at the start.
    Parameters per site: N D + 1.
    """

    joint = False

    def __init__(
        self, config: AdaptionPromptConfig, place: Attention, base: Any, shared: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.heads = place.heads, place.head_dim
        names = dict(place.module.named_children())
        found = [names[name] for kind in ("key", "value") for name in PROJECTIONS[kind] if name in names]
        self.norm = (names["k_norm"],) if "k_norm" in names else ()  # not as a module: its parameters are the base's
        self.behind = len(found) < 2
        if self.behind and "c_attn" not in names:
            raise ValueError(
                f"AdaptionPromptConfig: {place.path!r} ({type(place.module).__name__}) has no layers of its own for "
                f"keys and values (it has {', '.join(names)}), and the prompt goes through those. A decoupled "
                "PrefixTuningConfig works there."
            )
        self.layers = [names["c_attn"]] if self.behind else found
        self.P = nn.Parameter(torch.randn(config.adapter_len, Layer(self.layers[0]).shape[1]))  # (N, D)
        self.gate = nn.Parameter(torch.zeros(()))

    @classmethod
    def places(cls, config: AdaptionPromptConfig, base: Any) -> list[Place]:
        found = joinable("AdaptionPromptConfig", base)
        role = "decoder" if any(p.role == "decoder" for p in found) else "encoder"
        found = [p for p in found if p.role == role]
        ends = sorted({p.path.rpartition(".")[2] for p in found})
        if config.target_modules is not None:
            found = [p for p in found if p.path.rpartition(".")[2] == config.target_modules]
        if not found:
            raise ValueError(
                f"AdaptionPromptConfig: target_modules={config.target_modules!r} is none of the attention modules of "
                f"this model, which are called {', '.join(ends)}. Leave it out: they are found."
            )
        if len(found) < config.adapter_layers:
            raise ValueError(
                f"AdaptionPromptConfig: adapter_layers={config.adapter_layers}, and {type(base).__name__} has "
                f"{len(found)} such layers."
            )
        return list(found[-config.adapter_layers :])

    def prefix(self) -> tuple[Tensor, Tensor]:
        made = [_applied(layer, self.P) for layer in self.layers]
        keys, values = made[0].chunk(3, dim=-1)[1:] if self.behind else made
        norm = self.norm[0] if self.norm else None
        if norm is not None and Layer(norm).shape[0] == keys.shape[-1] != self.heads[1]:
            keys, norm = _applied(norm, keys), None
        keys, values = (t.unflatten(-1, self.heads).transpose(0, 1) for t in (keys, values))  # (H, N, D)
        return (keys if norm is None else _applied(norm, keys)), values

    def strength(self) -> Tensor:
        return self.gate


def _applied(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer of the base makes of x, from outside of its call: its values may wait elsewhere."""
    layer = Layer(module)
    bias = None if layer.bias is None else layer.value("bias").to(x.device)
    return layer.apply(x, layer.weight().to(x.device), bias)
