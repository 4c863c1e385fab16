from dataclasses import dataclass

import torch
from torch import Tensor

from . import Pair, Site, gathered, start


@start("eva", data="initialize_lora_eva_weights(model, dataloader)")
def eva(at: Site) -> Pair | None:
    """A = the r directions in which the layer's inputs vary most; B zero

    Explained Variance Adaptation, Paischer et al. 2024, arXiv:2410.07170. How many a layer gets, of those of all layers
    together, goes by the share of its inputs' variance that each explains.
    """
    directions = gathered(at.layer.module, "eva")
    if directions is None:
        return None
    return directions, torch.zeros(at.shape[0], len(directions), device=directions.device)


@dataclass
class Moments:
    """Sums over the inputs of a layer, by which their covariance is known exactly, however they come."""

    count: int = 0
    total: Tensor | float = 0.0
    products: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """x: (N, I)"""
        x = x.detach().float()
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.products = self.products + x.mT @ x

    def directions(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """(R, I) those of most variance first; (R,) the share that each explains; (R,) its singular value."""
        assert isinstance(self.total, Tensor) and isinstance(self.products, Tensor)
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        values = values.flip(0).clamp(min=0)[:most]
        shares = values / covariance.trace().clamp(min=torch.finfo(values.dtype).tiny)
        return vectors.mT.flip(0)[:most], shares, (values * self.count).sqrt()


def shared_out(shares: dict[str, Tensor], ranks: dict[str, int]) -> dict[str, int]:
    """Of as many ranks as there were, those that explain most, wherever they are."""
    every = sorted(((float(s), path) for path, found in shares.items() for s in found), reverse=True)
    counts = dict.fromkeys(ranks, 0)
    for _, path in every[: sum(ranks.values())]:
        counts[path] += 1
    return counts
