"""Rows of a matrix in groups, by k-means."""

import numpy as np
import torch
from torch import Tensor

_SEED = 123456789
"""Of the rows that groups begin at: the field's library has this one."""
_ROUNDS = 10


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
