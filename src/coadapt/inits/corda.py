import torch
from torch import Tensor

from . import Pair, Site, gathered, start


@start("corda", from_base=True, data="preprocess_corda(model, lora_config, run_model)")
def corda(at: Site) -> Pair | None:
    """B = U √(S / s), A = √(S / s) Vᵀ C⁻¹, of r singular values of W C = U S Vᵀ, C the covariance of the layer's inputs

    CorDA: Context-Oriented Decomposition Adaptation, Yang et al. 2024, arXiv:2406.05223. The largest ones
    ("ipm": learn what the inputs are about) or the smallest ("kpm": keep what they are about).
    """
    found = gathered(at.layer.module, "corda")
    if found is None:
        return None
    u, s, v = found
    if len(s) != at.rank:
        raise ValueError(
            f"preprocess_corda was called with r={len(s)} at {at.layer.path!r}, and this adapter has r={at.rank} there."
        )
    root = (s / at.scale).sqrt()
    return root[:, None] * v, u * root


def decomposed(weight: Tensor, covariance: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), S (R,) and Vᵀ C⁻¹ (R, I). C gets more on its diagonal until it can be inverted."""
    damp, one = 0.01, torch.eye(len(covariance), device=covariance.device)
    while True:
        fixed = covariance + damp * covariance.diagonal().mean() * one
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, one) < 0.05 or damp > 1e3:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ fixed, full_matrices=False)
    kept = slice(0, rank) if method == "ipm" else slice(len(s) - rank, len(s))
    return u[:, kept].clone(), s[kept].clone(), (vh[kept] @ inverse)
