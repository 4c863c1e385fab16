import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core import roles, target
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import FromBase, Place, register


@dataclass(frozen=True, kw_only=True)
class OSFConfig(WeightConfig):
    """The small singular values of the weight and their vectors, trained; the large ones stay. All linear layers,
    unless targets are named."""

    kind = "OSF"
    unread: ClassVar[Mapping[str, str]] = {"target_svd_config": "peft does not read it either; see rank_pattern"}

    effective_rank: int | float | None = None
    """How many of the largest singular values stay as they are, or which share of all; left out, half of them."""
    rank_pattern: Mapping[str, int | float] | None = None
    """Other ranks for some layers: a regular expression for a part of a module's name -> rank, or share."""
    init_weights: bool = True
    """True: the parts that train start as they are in the base, so that nothing changes; False: normal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {"effective_rank": self.effective_rank}
        ranks |= {f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}
        for name, rank in ranks.items():
            if rank is not None and not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
                raise ValueError(f"OSFConfig: {name}={rank!r} must be a whole number of at least 1, or within (0, 1).")

    def rank(self, path: str, most: int) -> int:
        """How many of `most` singular values stay as they are at `path`."""
        patterns = self.rank_pattern or {}
        asked = next((rank for key, rank in patterns.items() if re.search(key, path)), self.effective_rank)
        kept = most // 2 if asked is None else int(most * asked) if isinstance(asked, float) else asked
        if not 0 < kept < most:
            raise ValueError(
                f"OSFConfig: of the {most} singular values of {path!r} effective_rank={asked} keeps {kept}; at least "
                "one must stay, and at least one train."
            )
        return kept


@register(OSFConfig)
class OSF(LowRankMethod):
    """W' = W + U diag(S) V - U0 diag(S0) V0, U0 S0 V0 the part of W's singular value decomposition that trains

    Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, Nayak et al. 2025,
    arXiv:2504.07097. Gradients of U and V are projected off the vectors that stay in the backward itself, so they are
    so in any loop, whatever optimiser it has. The base keeps its weight: the start is taken off again. Convolution
    kernels are laid out as (O, I K). Use it where several tasks follow one another and the earlier ones must stay.
    Parameters per site: r (O + I K + 1), with r singular values that train, half of all as a rule.
    """

    kinds = ("linear", "embedding", "conv")
    U: Tensor  # (O, R)
    S: Tensor  # (R,)
    V: Tensor  # (R, I K)

    def __init__(self, config: OSFConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.shape = layer.shape
        weight = layer.weight().flatten(1)  # (O, I)
        kept = config.rank(layer.path, min(weight.shape))
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        start = u[:, kept:], s[kept:], v[kept:]
        trained = (part.clone() if config.init_weights else torch.randn_like(part) for part in start)
        self.U, self.S, self.V = map(nn.Parameter, trained)  # (O, R), (R,) and (R, I K)
        self.base = FromBase()
        names = "start_U", "start_S", "start_V", "stay_U", "stay_V"
        for name, part in zip(names, (*start, u[:, :kept], v[:kept]), strict=True):
            self.base.register_buffer(name, part.clone())

    @classmethod
    def places(cls, config: OSFConfig, base: nn.Module) -> list[Place]:
        top = roles.heads(base)
        usual = [p for p, _ in roles.linears(base) if not any(p == h or p.startswith(f"{h}.") for h in top)]
        found = target.places(config, base, cls.kinds, usual)
        if idle := [key for key in config.rank_pattern or {} if not any(re.search(key, p.path) for p in found)]:
            raise ValueError(f"OSFConfig: rank_pattern {idle} matches none of the {len(found)} targets.")
        return found

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """As (U S - U0 S0) V + U0 S0 (V - V0): zero to the bit at the start, and nothing small is rounded away."""
        base, start = self.base, self.base.get_buffer("start_U") * self.base.get_buffer("start_S")
        u = _off(self.U.mT, base.get_buffer("stay_U").mT).mT
        v = _off(self.V, base.get_buffer("stay_V"))
        down = torch.cat([v, v - base.get_buffer("start_V")])
        up = torch.cat([u * self.S - start, start], dim=1)
        return down.view(-1, *self.shape[1:]), up, 1.0


def _off(rows: Tensor, stay: Tensor) -> Tensor:
    """(R, D) as it is; its gradient without what lies along the orthonormal rows of `stay`."""
    moved = rows - rows.detach()  # nothing
    return rows.detach() + (moved - moved @ stay.mT @ stay)
