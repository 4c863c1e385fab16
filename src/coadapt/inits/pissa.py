import torch

from . import Pair, Site, start


@start("pissa", from_base=True)
def pissa(at: Site) -> Pair:
    """s B A = the r largest singular values of W = U S Vᵀ, with S shared out: B = U √(S / s), A = √(S / s) Vᵀ

    PiSSA: Principal Singular Values and Singular Vectors Adaptation, Meng et al. 2024, arXiv:2404.02948.
    """
    at.within_rank("pissa")
    u, s, vh = torch.linalg.svd(at.weight(), full_matrices=False)
    return _shared_out(u, s, vh, at)


@start("pissa_niter_[n]", from_base=True)
def fast(at: Site) -> Pair:
    """The same with that many steps of subspace iteration in place of the whole decomposition (its section 4)."""
    at.within_rank(f"pissa_niter_{at.option}")
    u, s, v = torch.svd_lowrank(at.weight(), at.rank, niter=int(at.option or 0))
    return _shared_out(u, s, v.mT, at)


def _shared_out(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, at: Site) -> Pair:
    root = (s[..., : at.rank] / at.scale).sqrt()  # (..., R)
    return root[..., None] * vh[..., : at.rank, :], u[..., : at.rank] * root[..., None, :]
