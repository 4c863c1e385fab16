import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import TransposedConfig, WeightConfig
from ..core.decompositions import singular_vectors
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod
from ..core.method import FromBase, register
from ..core.rotation import cayley, cayley_neumann, skew


@dataclass(frozen=True, kw_only=True)
class PsoftConfig(WeightConfig, TransposedConfig):
    """The principal subspace of a layer's weight, rotated."""

    kind = "PSOFT"
    unread: ClassVar[Mapping[str, str]] = {"psoft_alpha": "it has no effect, since it cancels itself out"}

    r: int = 32
    """Of how many singular directions."""
    psoft_dropout: float = 0.0
    """Share of the inputs to the change that are dropped while training."""
    ab_svd_init: str = "psoft_init"
    """Where the singular values stand: "psoft_init", with the outputs, so that a rotation keeps angles; "pissa_init",
    half of each on both sides."""
    psoft_svd: str = "full"
    """How the directions are found: "full", or "lowrank", faster and random."""
    psoft_svd_lowrank_niter: int = 10
    """Iterations of the second."""
    random_seed: int = 0
    """Seed of the second."""
    psoft_orth: bool = True
    """False: any matrix in place of a rotation."""
    psoft_mag_b: bool = True
    """Scale its outputs."""
    psoft_mag_a: bool = True
    """Scale its inputs."""
    use_cayley_neumann: bool = False
    """Cayley's transform by a series instead of an inverse: faster, and a rotation only nearly."""
    num_cayley_neumann_terms: int = 5
    """How many terms of that series."""
    cayley_neumann_eps: float | None = None
    """How large Q may be for that series; beyond, it is scaled down."""
    init_weights: bool = True
    """True: nothing changes at the start; False: random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "psoft_svd_lowrank_niter")
        self.probability("psoft_dropout")
        self.choice("ab_svd_init", ("psoft_init", "pissa_init"))
        self.choice("psoft_svd", ("full", "lowrank"))
        if self.num_cayley_neumann_terms < 2 or not 0 < (self.cayley_neumann_eps or 0.5) < 1:
            raise ValueError("PsoftConfig: num_cayley_neumann_terms must be at least 2, cayley_neumann_eps in (0, 1).")
        for name, default, heeded in (
            ("psoft_svd_lowrank_niter", 10, self.psoft_svd == "lowrank"),
            ("random_seed", 0, self.psoft_svd == "lowrank"),
            ("use_cayley_neumann", False, self.psoft_orth),
            ("num_cayley_neumann_terms", 5, self.use_cayley_neumann),
            ("cayley_neumann_eps", None, self.use_cayley_neumann),
        ):
            if getattr(self, name) != default and not heeded:
                raise ValueError(f"PsoftConfig: {name}={getattr(self, name)!r} has no effect beside the other options.")


class Subspace(FromBase):
    """B0 (O, R) and A0 (R, I, *K): the principal subspace of the base's weight, B0 A0."""

    A0: Tensor
    B0: Tensor

    def __init__(self, config: PsoftConfig, weight: Tensor) -> None:
        super().__init__()
        flat, r = weight.flatten(1).to(torch.float32), config.r
        if weight.is_meta:
            u, s, vh = flat[:, :r], flat[0, :r], flat[:r]  # values come later
        elif config.psoft_svd == "full":
            u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        else:
            rounds = config.psoft_svd_lowrank_niter
            u, s, vh = singular_vectors(flat, r, config.random_seed, rounds, drawn_on=flat.device)
        out, into = (s[:r], 1) if config.ab_svd_init == "psoft_init" else (s[:r].sqrt(), s[:r, None].sqrt())
        self.register_buffer("A0", (vh[:r] * into).view(r, *weight.shape[1:]).clone())
        self.register_buffer("B0", u[:, :r] * out)


@register(PsoftConfig)
class PSOFT(LowRankMethod):
    """W' = W + B0 (diag(b) R diag(a) - I) A0, B0 A0 = the r largest singular directions of W, R = (I + Q) (I - Q)^-1

    Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, Wu et al. 2025, arXiv:2505.11235. A0 and B0
    are those of the base, in a Seq too. Files do not hold them: as in peft they are found again from the base, which
    must be the very same, and found by the same library, since signs are a matter of choice. peft's psoft_alpha cancels
    itself out and is left out here. Use it where OFT is too dear. Parameters per site: r (r - 1) / 2 + 2 r.
    """

    def __init__(self, config: PsoftConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        r, most = config.r, min(layer.shape[0], math.prod(layer.shape[1:]))
        if r > most:
            raise ValueError(f"PSOFT: r={r} is more than the {most} directions of {layer.path!r}. Pick a smaller r.")
        self.config, self.dropout = config, config.psoft_dropout
        start = torch.zeros(r * (r - 1) // 2) if config.psoft_orth else torch.eye(r)
        self.Q = nn.Parameter(start if config.init_weights else start + 0.1 * torch.randn(start.shape))  # or R itself
        self.b = nn.Parameter(torch.ones(r)) if config.psoft_mag_b else None  # (R,)
        self.a = nn.Parameter(torch.ones(r)) if config.psoft_mag_a else None  # (R,)
        self.subspace = Subspace(config, layer.weight())

    def turn(self) -> Tensor:
        """(R, R): diag(b) R diag(a) - I"""
        one = torch.eye(self.config.r, dtype=self.Q.dtype, device=self.Q.device)
        turn = self.rotation() if self.config.psoft_orth else self.Q - one
        if self.b is not None:
            turn = self.b[:, None] * turn + torch.diag(self.b - 1)
        return turn if self.a is None else turn * self.a + torch.diag(self.a - 1)

    def rotation(self) -> Tensor:
        q, most = skew(self.Q, self.config.r), self.config.cayley_neumann_eps
        if most is not None:
            q = q * (most / torch.linalg.matrix_norm(q).clamp(min=most))
        return cayley_neumann(q, self.config.num_cayley_neumann_terms) if self.config.use_cayley_neumann else cayley(-q)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.subspace.A0, self.subspace.B0 @ self.turn().to(self.subspace.B0.dtype), 1.0
