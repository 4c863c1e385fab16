import torch

from . import Pair, Site, start


@start("mica", freezes_b=True)
def mica(at: Site) -> Pair:
    """B = the r left singular vectors of W with the smallest singular values, frozen; A zero

    MiCA: Minor Component Adaptation, arXiv:2604.01694. Changes W only where it has the least effect.
    """
    at.within_rank("mica")
    u = torch.linalg.svd(at.weight(), full_matrices=False).U
    return torch.zeros(*at.shape[:-2], at.rank, at.shape[-1]), u[..., -at.rank :]
