import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.layer import Layer
from ..core.method import register
from ..core.rotation import Rotation, features


@dataclass(frozen=True, kw_only=True)
class HRAConfig(WeightConfig):
    """The inputs of layers, mirrored r times."""

    kind = "HRA"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    r: int = 8
    """How many reflections."""
    apply_GS: bool = False
    """Make the mirrors orthogonal to each other (Gram-Schmidt)."""
    init_weights: bool = True
    """True: reflections come in pairs that undo each other, so that nothing changes at the start (but for the last of
    an odd number, and with `apply_GS`); False: all random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")


@register(HRAConfig)
class HRA(Rotation):
    """W' = W H_1 ... H_r, H_i = I - 2 u_i u_i^T / norm(u_i)^2

    Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, Yuan et al. 2024,
    arXiv:2405.17484. The product is never made: it is I - U T U^T with a triangular T, so a call costs what a LoRA of
    rank r does. The paper's pull towards orthogonal mirrors (lambda) is not part of it; `apply_GS` is its limit. peft's
    pairs are no pairs with `apply_GS`: the second has no direction of its own; here that start is random. Use it
    where a layer's geometry should stay and few parameters must do. Parameters per site: r I K.
    """

    def __init__(self, config: HRAConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.orthogonal, size = config.apply_GS, features(layer)
        if config.r > size:
            raise ValueError(f"HRA: r={config.r} is more than the {size} features of {layer.path!r}. Pick a smaller r.")
        paired = config.init_weights and not config.apply_GS
        u = torch.empty(size, (config.r + 1) // 2 if paired else config.r)
        nn.init.kaiming_uniform_(u, a=math.sqrt(5))
        self.U = nn.Parameter(u.repeat_interleave(2, dim=1)[:, : config.r].clone() if paired else u)  # (I K, r)

    def made(self) -> tuple[Tensor, Tensor]:
        """U of unit length and U T^T. H_1 ... H_r = I - U T U^T where T^-1 = I / 2 + what is above the diagonal of
        U^T U (Joffrain et al. 2006)."""
        u = self.U.to(torch.promote_types(self.U.dtype, torch.float32))
        if self.orthogonal:
            u = torch.linalg.qr(u)[0]
            return u, 2 * u
        u = u / torch.linalg.vector_norm(u, dim=0)
        inverse = (u.mT @ u).triu(1) + torch.eye(u.shape[1], dtype=u.dtype, device=u.device) / 2
        return u, torch.linalg.solve_triangular(inverse, u.mT, upper=True).mT

    def rotated(self, x: Tensor, made: Any, back: bool = False) -> Tensor:
        u, ut = (part.to(x.dtype) for part in made)
        return x - (x @ u) @ ut.mT if back else x - (x @ ut) @ u.mT
