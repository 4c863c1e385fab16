"""Rows of a matrix in groups: by k-means in the space of its largest singular vectors."""

import numpy as np
import torch
from torch import Tensor

_SEED = 123456789
"""Of the rows that groups begin at: the field's library has this one."""
_ROUNDS = 10


def singular_vectors(matrix: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """U (O, R) and V (R, I) of the `count` largest singular values, by two rounds of subspace iteration.

    Halko et al. 2009, arXiv:0909.4061, algorithm 5.1; the same that torch.svd_lowrank gives after manual_seed(seed).
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    start = torch.randn(tall.shape[1], count, generator=torch.Generator().manual_seed(seed), device="cpu")
    basis = torch.linalg.qr(tall @ start.to(matrix)).Q
    for _ in range(2):
        basis = torch.linalg.qr(tall.mT @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, _, v = torch.linalg.svd(basis.mT @ tall, full_matrices=False)
    u = basis @ u
    return (u, v) if tall is matrix else (v.mT, u.mT)


def groups(rows: Tensor, count: int) -> Tensor:
    """(O,) the group of each row of (O, R), out of `count`: Lloyd's algorithm, at most ten rounds, from random rows.

    As scikit-learn's KMeans goes about it, so that the same rows are in the same groups.
    """
    points = rows.detach().cpu().to(torch.float32)
    points = points - points.mean(0)
    close_enough = 1e-4 * float(points.var(0, correction=0).mean())
    chance = np.full(len(points), 1 / np.float32(len(points)), dtype=np.float32)
    chosen = np.random.RandomState(_SEED).choice(len(points), size=count, replace=False, p=chance)
    centers, found = points[torch.from_numpy(chosen)], torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        nearest = _nearest(points, centers)
        moved = _means(points, nearest, centers)
        shift = float((moved - centers).square().sum())
        centers, same, found = moved, torch.equal(nearest, found), nearest
        if same:
            return found
        if shift <= close_enough:
            break
    return _nearest(points, centers)


def _nearest(points: Tensor, centers: Tensor) -> Tensor:
    return (centers.square().sum(1) - 2 * points @ centers.mT).argmin(1)


def _means(points: Tensor, nearest: Tensor, centers: Tensor) -> Tensor:
    """The mean of each group; an empty one gets the point that is farthest from its own center."""
    sums = torch.zeros_like(centers).index_add_(0, nearest, points)
    sizes = nearest.bincount(minlength=len(centers)).to(points)
    if len(empty := (sizes == 0).nonzero()[:, 0]):
        far = (points - centers[nearest]).square().sum(1).argsort(descending=True)[: len(empty)]
        sums.index_add_(0, nearest[far], -points[far])
        sizes.index_add_(0, nearest[far], -torch.ones(len(far)))
        sums[empty], sizes[empty] = points[far], 1.0
    return sums / sizes[:, None]
