import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.layer import Layer
from ..core.method import Driven, register
from ..core.rotation import Rotation, cayley, cayley_neumann, features, in_blocks, skew


@dataclass(frozen=True, kw_only=True)
class OFTConfig(WeightConfig):
    """The inputs of layers, rotated in blocks of features."""

    kind = "OFT"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    r: int = 0
    """How many blocks, in place of `oft_block_size`."""
    oft_block_size: int = 32
    """Features in a block; 0 where `r` is given. It divides the input features of each target."""
    module_dropout: float = 0.0
    """Share of the blocks that are left unrotated, drawn for each call while training."""
    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""
    init_weights: bool = True
    """True: nothing is rotated at the start; False: random rotations."""
    coft: bool = False
    """Keep the rotations small: COFT."""
    eps: float = 6e-5
    """With `coft`: how large all Q of a layer may be together."""
    block_share: bool = False
    """The same rotation in all blocks of a layer."""
    use_cayley_neumann: bool = True
    """Cayley's transform by a series instead of an inverse: faster, and a rotation only nearly."""
    num_cayley_neumann_terms: int = 5
    """How many terms of that series."""

    @property
    def method(self) -> str:
        return "COFT" if self.coft else "OFT"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.probability("module_dropout")
        self.positive(*(name for name in ("r", "oft_block_size") if getattr(self, name) != 0))
        if bool(self.r) == bool(self.oft_block_size):
            raise ValueError(
                f"OFTConfig: r={self.r} blocks of oft_block_size={self.oft_block_size}: give one of them, and 0 for "
                "the other; their product is the number of input features."
            )
        if self.num_cayley_neumann_terms < 2 or not self.eps > 0:
            raise ValueError("OFTConfig: num_cayley_neumann_terms must be at least 2, and eps above 0.")
        if self.module_dropout and self.block_share:
            raise ValueError("OFTConfig: module_dropout leaves out single blocks; with block_share there is only one.")
        for name, needs, default in (("num_cayley_neumann_terms", "use_cayley_neumann", 5), ("eps", "coft", 6e-5)):
            if getattr(self, name) != default and not getattr(self, needs):
                raise ValueError(f"OFTConfig: {name} has no effect without {needs}=True.")


@register(OFTConfig)
class OFT(Rotation):
    """W' = W R^T, R = diag(R_1 ... R_b), R_i = (I - Q_i) (I + Q_i)^-1, Q_i^T = -Q_i

    Controlling Text-to-Image Diffusion by Orthogonal Finetuning, Qiu et al. 2023, arXiv:2306.07280; rotating inputs
    instead of weights, and the series in place of the inverse: Orthogonal Finetuning Made Scalable, Qiu et al. 2025,
    arXiv:2506.19847. With the series (the default) R_i is that of -Q_i, as in peft's files. At an embedding what it
    gives is rotated. peft ignores `module_dropout`, rounds a block size that does not fit, and computes something else
    at convolutions before they are merged than after; here both are W'. Use it where angles and lengths between a
    layer's neurons should stay as they are. Parameters per site: I (k - 1) / 2 for blocks of k.
    """

    def __init__(self, config: OFTConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.config, among = config, features(layer)
        name, number = ("r", config.r) if config.r else ("oft_block_size", config.oft_block_size)
        if among % number:
            raise ValueError(
                f"OFT: {name}={number} does not divide the {among} features of {layer.path!r}. Pick a divisor of them."
            )
        self.size = config.oft_block_size or among // config.r
        count = 1 if config.block_share else among // self.size
        self.Q = nn.Parameter(torch.zeros(count, self.size * (self.size - 1) // 2))  # (b, k (k - 1) / 2)
        if not config.init_weights:
            nn.init.normal_(self.Q, std=0.1)

    def made(self) -> Tensor:
        q = skew(self.bounded(), self.size)
        return cayley_neumann(q, self.config.num_cayley_neumann_terms) if self.config.use_cayley_neumann else cayley(q)

    def bounded(self) -> Tensor:
        return self.Q

    def in_call(self, made: Tensor) -> Tensor:
        if not self.training or not self.config.module_dropout:
            return made
        return made * (torch.rand(len(made), 1, 1, device=made.device) >= self.config.module_dropout)

    def rotated(self, x: Tensor, made: Tensor, back: bool = False) -> Tensor:
        return in_blocks(x, made.mT if back else made)


@register(OFTConfig, variant="COFT")
class COFT(OFT, Driven):
    """W' = W R^T as in OFT, with norm(Q_i) <= eps / sqrt(b)

    The constrained form of the same paper, arXiv:2306.07280. Trained by projected steps: after each, what went too far
    is drawn back. Use it where OFT strays. Parameters per site: I (k - 1) / 2.
    """

    def bounded(self) -> Tensor:
        return self.Q + (self.projected() - self.Q).detach()  # the gradient of a projected step

    @torch.no_grad()
    def projected(self) -> Tensor:
        most = self.config.eps / math.sqrt(len(self.Q))
        norms = math.sqrt(2) * torch.linalg.vector_norm(self.Q, dim=1, keepdim=True)  # each entry stands in Q_i twice
        return self.Q * (most / norms.clamp(min=most))

    @classmethod
    def after_step(cls, methods: Sequence[Any], step: int) -> None:
        for method in methods:
            method.Q.copy_(method.projected())
