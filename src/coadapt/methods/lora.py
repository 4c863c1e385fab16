import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import RankedConfig
from ..core import target
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod, is_plain
from ..core.method import Companion, Place, register
from .bitfit import WithBiases
from .trainable_tokens import TrainableTokens, TrainableTokensConfig


@dataclass(frozen=True, kw_only=True)
class LoraConfig(RankedConfig):
    """W' = W + (alpha / r) B A at the layers that are targeted."""

    kind = "LORA"
    foreign: ClassVar[Mapping[str, Any]] = {"megatron_core": "megatron.core", "qalora_group_size": 16}

    r: int = 8
    """Rank of the change."""
    lora_alpha: int | float = 8
    """Scale of the change: it is multiplied by alpha / r, or by alpha / sqrt(r) with `use_rslora`."""
    lora_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""
    bias: str = "none"
    """Biases to train along: "none", "lora_only" (of the targeted layers) or "all"."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    init_lora_weights: bool | str = True
    """True: A random, B zero, so that nothing changes at the start; "gaussian": A normal; False: both random."""
    target_parameters: Sequence[str] | None = None
    """Ends of the names of parameters that are no layer's weight: fused experts (`mlp.experts.down_proj`), each expert
    with factors of its own."""
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    """Tokens whose embeddings are trained along, of a tied head too; for other layers than the input embedding
    {module name: tokens}."""
    use_dora: bool = False
    """Train each row's length apart from its direction: DoRA (arXiv:2402.09353)."""

    @property
    def method(self) -> str:
        return "DORA" if self.use_dora else "LORA"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("lora_dropout")
        if self.target_parameters is not None and (self.lora_dropout or self.use_dora or not self.target_parameters):
            raise ValueError(
                "LoraConfig: target_parameters names at least one parameter; lora_dropout and use_dora have no effect "
                "on parameters, which have no input of their own. Put layers with those into another adapter."
            )
        self.choice("bias", ("none", "lora_only", "all"))
        self.choice("init_lora_weights", (True, False, "gaussian"))


@register(LoraConfig)
class LoRA(WithBiases, LowRankMethod):
    """W' = W + (alpha / r) B A

    LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv:2106.09685.
    On an embedding A starts at zero and B random. Parameters per site: r (O + I K).
    """

    kinds = ("linear", "embedding", "conv", "experts", "parameter")

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        experts = layer.shape[:1] if layer.kind.name == "experts" else ()
        out_features, *in_dims = layer.shape[len(experts) :]
        r = target.matching(config.rank_pattern, layer.path, config.r)
        alpha = target.matching(config.alpha_pattern, layer.path, config.lora_alpha)
        self.scale = alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout = config.lora_dropout
        self.widens = not is_plain(layer.module)
        self.A = nn.Parameter(torch.empty(*experts, r, *in_dims))  # (R, I, *K); of experts (E, R, I)
        self.B = nn.Parameter(torch.zeros(*experts, out_features, r))  # (O, R); of experts (E, O, R)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.A.flatten(0, len(experts)), a=math.sqrt(5))  # as each expert by itself
        if layer.kind.name == "embedding":
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        if config.init_lora_weights is False:
            nn.init.normal_(self.A if layer.kind.name == "embedding" else self.B, std=0.02)

    @classmethod
    def places(cls, config: LoraConfig, base: nn.Module) -> list[Place]:
        raw = target.parameters(config, base)
        places = [] if raw and config.target_modules is None else super().places(config, base)
        places += raw
        target.check_patterns(config, places, "rank_pattern", "alpha_pattern")
        target.check_transposed(config, [place.module for place in places])
        return places

    @classmethod
    def companions(cls, config: LoraConfig, base: nn.Module, places: list[Place]) -> list[Companion]:
        tokens = config.trainable_token_indices
        named = tokens if isinstance(tokens, Mapping) else {None: tokens} if tokens else {}
        found_tokens = [
            TrainableTokensConfig(token_indices=ids, target_modules=None if name is None else [name])
            for name, ids in named.items()
        ]
        beside = [Companion(TrainableTokens, own, TrainableTokens.places(own, base)) for own in found_tokens]
        return [*super().companions(config, base, places), *beside]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, self.scale
