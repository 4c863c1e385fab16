import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import BiasConfig, TransposedConfig
from ..core import target
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import Place, register
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(BiasConfig, TransposedConfig):
    """W' = W + B A at the targets; both are put together from the vectors of one bank, which all of them share."""

    kind = "VBLORA"

    r: int = 4
    """Rank of the change."""
    num_vectors: int = 256
    """How many vectors the bank has."""
    vector_length: int = 256
    """Their length; must divide the inputs and outputs of all targets."""
    topk: int = 2
    """Of how many vectors each piece of A and B is a mixture."""
    vblora_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    init_vector_bank_bound: float = 0.02
    """The bank starts uniform between minus and plus this."""
    init_logits_std: float = 0.1
    """Spread of the normal numbers with which the choice of vectors starts."""
    save_only_topk_weights: bool = False
    """Write only which vectors each piece has, and their weights: smaller files, which cannot be trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "num_vectors", "vector_length", "topk")
        self.probability("vblora_dropout")
        if self.topk > self.num_vectors:
            raise ValueError(f"VBLoRAConfig: topk={self.topk} of num_vectors={self.num_vectors} vectors.")


class Bank(nn.Module):
    """The vectors."""

    def __init__(self, config: VBLoRAConfig) -> None:
        super().__init__()
        bound = config.init_vector_bank_bound
        self.V = nn.Parameter(torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound))


@register(VBLoRAConfig)
class VBLoRA(WithBiases, LowRankMethod):
    """W' = W + B A, each piece of A and B sum_k softmax(top_k(z))_k v_k

    VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, Li et al. 2024, arXiv:2405.15179. As published,
    it does not start at the base: the bank is random, and small. The bank learns faster than the choice (the paper:
    1e-3 for v, 1e-2 for z). Use it where the file must be small. Parameters per site: r (O + I K) h / b for h vectors
    of length b; h b in all.
    """

    def __init__(self, config: VBLoRAConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        sizes, self.shape, length = (layer.shape[0], math.prod(layer.shape[1:])), layer.shape[1:], config.vector_length
        self.topk, self.dropout = config.topk, config.vblora_dropout
        pieces, std = [size // length for size in sizes], config.init_logits_std
        self.zA = nn.Parameter(torch.empty(config.r, pieces[1], config.num_vectors).normal_(0, std))  # (R, I/b, h)
        self.zB = nn.Parameter(torch.empty(pieces[0], config.r, config.num_vectors).normal_(0, std))  # (O/b, R, h)
        self.best_only, self.settled = config.save_only_topk_weights, False

    @classmethod
    def places(cls, config: VBLoRAConfig, base: nn.Module) -> list[Place]:
        places = super().places(config, base)
        target.check_divides(config, "vector_length", places)
        return places

    @classmethod
    def shared(cls, config: VBLoRAConfig, base: nn.Module, places: list[Place]) -> Bank:
        return Bank(config)

    def settle(self, logits: Tensor, which: Tensor, weights: Tensor) -> None:
        """Sets `logits` to those that give the vectors `which` (..., k) these weights (..., k - 1), and no others any.
        They say nothing about the others, so that there is nothing to train."""
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1).clamp(min=0).to(logits)
        with torch.no_grad():
            logits.fill_(-math.inf).scatter_(-1, which.to(logits.device, torch.long), weights.log())
        self.settled = True

    def factors(self) -> tuple[Tensor, Tensor, float]:
        if self.settled and self.training and self.zA.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "This VB-LoRA was written with save_only_topk_weights, for inference: its choice of vectors cannot be "
                "trained on. Train one that was written without."
            )
        a, b = self.mixed(self.zA), self.mixed(self.zB)  # (R, I/b, b) and (O/b, R, b)
        return a.reshape(-1, *self.shape), b.mT.flatten(0, 1), 1.0

    def mixed(self, logits: Tensor) -> Tensor:
        """(..., h) -> (..., b)"""
        best, which = logits.topk(self.topk, dim=-1)
        return (best.softmax(-1)[..., None] * self.bank.V.to(logits)[which]).sum(-2)
