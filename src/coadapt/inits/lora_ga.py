import torch
from torch import Tensor

from ..lora_options import LoraGAConfig
from . import Pair, Site, gathered, start


@start("lora_ga", from_base=True, data="preprocess_loraga(model, lora_config, train_step)")
def lora_ga(at: Site) -> Pair | None:
    """A and B from singular vectors of the weight's gradient, so that the first steps go where full training would

    LoRA-GA: Low-Rank Adaptation with Gradient Approximation, Wang et al. 2024, arXiv:2407.05000. Which of the first 2 r
    go to A and which to B is `direction`; how large they are, `scale`. B has the gradient's singular values.
    """
    gradient = gathered(at.layer.module, "lora_ga")
    if gradient is None:
        return None
    options, r = at.settings or LoraGAConfig(), at.rank
    if 2 * r > min(gradient.shape):
        raise ValueError(
            f"LoRA-GA takes 2 r = {2 * r} singular vectors, and {at.layer.path!r} has {min(gradient.shape)}; use a "
            "smaller r there (rank_pattern)."
        )
    u, s, v = torch.svd_lowrank(gradient.float(), q=min(4 * r, *gradient.shape), niter=4)
    down, up = _chosen(options.direction, r)
    a, b = v.mT[down], u[:, up] * s[up]
    match options.scale:
        case "stable":
            b = b * (at.shape[0] ** 0.25 / options.stable_gamma**0.5)
        case "weight_svd":
            largest = torch.linalg.matrix_norm(at.weight(), 2)
            b = b * (largest / s[up][0].clamp(min=1e-12))
        case "gd_scale":
            a, b = a / at.scale, b / at.scale
        case _:
            pass
    return a, b


def _chosen(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which of the first 2 r singular vectors are A's and which are B's."""
    every = torch.arange(2 * r)
    match direction:
        case "ArBr":
            return every[1::2], every[0::2]
        case "A2rBr":
            return every[r:], every[:r]
        case "ArB2r":
            return every[:r], every[r:]
        case _:
            some = torch.randperm(2 * r)[:r]
            return some, some
