import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.layer import Known, Layer
from ..core.lowrank import is_plain
from ..core.method import AdditiveMethod, FromBase, register
from ..core.scattered import scattered
from .lora import LoRA, LoraConfig


@dataclass(frozen=True, kw_only=True)
class SupertuningConfig(WeightConfig):
    """The entries of the weight that are largest (or smallest), trained where they stand; with `r` a LoRA beside."""

    kind = "SUPERTUNING"

    sparsity: float = 0.99
    """Share of the entries that do not train."""
    select_top: bool = True
    """True: the entries that are largest by magnitude train; False: the smallest."""
    r: int | None = None
    """Rank of a LoRA beside the entries (Supra); left out, there is none."""
    lora_alpha: int | float | None = None
    """Scale of that LoRA: it is multiplied by alpha / r. Left out, 2 r."""
    lora_dropout: float = 0.0
    """Share of the inputs to its A that are dropped while training."""
    init_weights: bool = True
    """True: nothing changes at the start; False: normal changes."""
    save_precomputed_indices: bool = True
    """Whether files hold which entries train; otherwise they are found in the base again, which must be the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("sparsity", "lora_dropout")
        if self.r is None and (self.lora_alpha is not None or self.lora_dropout):
            raise ValueError("SupertuningConfig: lora_alpha and lora_dropout have no effect without r.")


@register(SupertuningConfig)
class SuperTuning(AdditiveMethod):
    """W' = W + S, or W + S + (alpha / r) B A, S zero but at the largest entries of W

    Supra-Tuning: Combining Outlier and Low-Rank Adaptation for Sparse and Efficient LLM Fine-Tuning, arXiv:2607.09287.
    Large entries matter most, so those train (Super); with `r` a LoRA beside them (Supra). Entries are ranked by their
    magnitude, as in peft; the paper also has calibrated scores. They are found in the base's weight, whatever stands
    below in a Seq. Use it where a fixed, small share of the weights themselves should train.
    Parameters per site: (1 - sparsity) O I K, and r (O + I K) with `r`.
    """

    def __init__(self, config: SupertuningConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.shape = layer.shape
        scores = layer.weight().abs().flatten()
        n = int(scores.numel() * (1 - config.sparsity))
        if n < 1:
            raise ValueError(
                f"SupertuningConfig: sparsity={config.sparsity} leaves none of the {scores.numel()} entries of "
                f"{layer.path!r} to train. Lower it."
            )
        self.where = nn.Module() if config.save_precomputed_indices else FromBase()
        self.where.register_buffer("at", scores.topk(n, largest=config.select_top).indices.to(torch.int32))  # (N,)
        self.s = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))  # (N,)
        self.lora: LoRA | None = None
        if config.r is not None:
            alpha = 2 * config.r if config.lora_alpha is None else config.lora_alpha
            options: dict[str, Any] = {"lora_dropout": config.lora_dropout, "init_lora_weights": config.init_weights}
            self.lora = LoRA(LoraConfig(r=config.r, lora_alpha=alpha, **options), layer)

    def sparse(self) -> Tensor:
        """S, (O, I, *K)"""
        return scattered(self.s, self.where.get_buffer("at").long(), math.prod(self.shape)).view(self.shape)

    def change(self) -> Tensor:
        return self.sparse() if self.lora is None else self.lora.merge(self.sparse())

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if self.lora is None or not is_plain(base.module):
            return super().forward(x, base)
        y = base(x)
        return self.lora(x, Known(base, x, y + base.apply(x, self.sparse()).to(y.dtype)))
