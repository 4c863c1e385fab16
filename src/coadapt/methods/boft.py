from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.layer import Layer
from ..core.method import register
from ..core.rotation import Rotation, cayley, features, in_blocks


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(WeightConfig):
    """The inputs of layers, rotated in blocks of features several times, with other neighbours each time."""

    kind = "BOFT"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    boft_block_size: int = 4
    """Features in a block; 0 where `boft_block_num` is given. It divides the input features of each target."""
    boft_block_num: int = 0
    """How many blocks, in place of their size."""
    boft_n_butterfly_factor: int = 1
    """How often blocks are rotated: with m, each output sees 2^(m - 1) blocks rotated together."""
    boft_dropout: float = 0.0
    """Share of the blocks that are left unrotated, in one of the rotations, drawn for each call while training."""
    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""
    init_weights: bool = True
    """True: nothing changes at the start; False: random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("boft_n_butterfly_factor")
        self.probability("boft_dropout")
        self.positive(*(name for name in ("boft_block_size", "boft_block_num") if getattr(self, name) != 0))
        if bool(self.boft_block_size) == bool(self.boft_block_num):
            raise ValueError(
                f"BOFTConfig: boft_block_num={self.boft_block_num} blocks of boft_block_size={self.boft_block_size}: "
                "give one of them, and 0 for the other; their product is the number of input features."
            )


@register(BOFTConfig)
class BOFT(Rotation):
    """W' = diag(s) W (R_m ... R_1)^T, R_i = P_i diag(R_i1 ... R_ib) P_i^T, R_ij = (I - Q) (I + Q)^-1

    Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, Liu et al. 2023, arXiv:2311.06243. Q is the
    skew-symmetric part of A_ij. The permutations P_i take half blocks that are 2^(i - 1) apart together. peft makes
    m = 1 of any other where its CUDA code cannot be built; here m is what is asked for, everywhere. Use it where OFT's
    blocks see too little of each other. Parameters per site: m I k + O for blocks of k.
    """

    def __init__(self, config: BOFTConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        among, factors = features(layer), config.boft_n_butterfly_factor
        size = config.boft_block_size or among // config.boft_block_num
        together = max(size, 1) * 2 ** (factors - 1)
        if among % (config.boft_block_size or config.boft_block_num) or among % together or (factors > 1 and size % 2):
            raise ValueError(
                f"BOFT: {layer.path!r} has {among} features. They must be a multiple of the blocks that are rotated "
                f"together, boft_block_size * 2^(boft_n_butterfly_factor - 1), here {together}, and blocks of more "
                "than one rotation of even size. Pick others."
            )
        self.dropout = config.boft_dropout
        self.A = nn.Parameter(torch.zeros(factors, among // size, size, size))  # (m, b, k, k)
        self.s = nn.Parameter(torch.ones(layer.shape[0]))  # (O,)
        if not config.init_weights:
            nn.init.normal_(self.A, std=0.1)
            nn.init.normal_(self.s, mean=1.0, std=0.1)

    def made(self) -> Tensor:
        """(m, b, k, k): R_ij - I"""
        return cayley((self.A - self.A.mT) / 2)

    def in_call(self, made: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return made
        kept = torch.rand(*made.shape[:2], 1, 1, device=made.device) >= self.dropout
        others = torch.arange(len(made)) != torch.randint(len(made), ())
        return made * (kept | others.view(-1, 1, 1, 1).to(made.device))

    def rotated(self, x: Tensor, made: Tensor, back: bool = False) -> Tensor:
        order = range(len(made)) if back else reversed(range(len(made)))
        half = made.shape[-1] // 2
        for i in order:
            if i:
                x = x.unflatten(-1, (-1, 2, 2**i, half)).transpose(-3, -2).flatten(-4)  # x P
            x = in_blocks(x, made[i].mT if back else made[i])
            if i:
                x = x.unflatten(-1, (-1, 2**i, 2, half)).transpose(-3, -2).flatten(-4)  # x P^T
        return x

    def merge(self, weight: Tensor) -> Tensor:
        return self.s.view(-1, *[1] * (weight.dim() - 1)) * super().merge(weight)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y, bias = super().forward(x, base), base.bias
        if self.kind == "conv":
            return y  # as merged
        y = base.scaled(y, self.s)
        return y if bias is None else y + base.along_channels(((1 - self.s) * bias).to(y.dtype), y)
