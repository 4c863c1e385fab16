"""Matrices taken apart: into few singular vectors, and several of them along one basis."""

from collections.abc import Sequence

import torch
from torch import Tensor


def singular_vectors(
    matrix: Tensor, count: int, seed: int, rounds: int = 2, drawn_on: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), S (R,) and V (R, I) of the `count` largest singular values, by so many rounds of subspace iteration.

    Halko et al. 2009, arXiv:0909.4061, algorithm 5.1; the same that torch.svd_lowrank gives after manual_seed(seed).
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    draws = torch.Generator(drawn_on).manual_seed(seed)
    start = torch.randn(tall.shape[1], count, generator=draws, device=drawn_on)
    basis = torch.linalg.qr(tall @ start.to(matrix)).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, v = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u = basis @ u
    return (u, s, v) if tall is matrix else (v.mT, s, u.mT)


def common_basis(matrices: Sequence[Tensor], more: float) -> Tensor:
    """(I, I) a V for all of them, (O_i, I): R^T E, with the matrices stacked to Q R, and E the eigenvectors of
    mean_i (Q_i^T Q_i + more)^-1. The singular value decomposition of higher order, doi:10.1371/journal.pone.0028072.
    """
    together = torch.cat(list(matrices))
    if together.shape[0] < together.shape[1]:
        return torch.linalg.svd(together, full_matrices=True)[2].mT.contiguous()
    q, r = torch.linalg.qr(together)
    eye = more * torch.eye(len(r), dtype=r.dtype, device=r.device)
    inverses = [torch.linalg.inv(part.mT @ part + eye) for part in q.split([len(m) for m in matrices])]
    total = torch.zeros_like(r)
    for inverse in inverses:
        total = total + inverse
    return r.mT @ torch.linalg.eigh(total / len(inverses))[1]
