import torch

from . import Pair, Site, start


@start("olora", from_base=True)
def olora(at: Site) -> Pair:
    """W = Q R: B is the first r columns of Q, A the first r rows of R

    OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, Büyükakyüz 2024, arXiv:2406.01775. Of the weight as
    (O, I) whichever way a layer stores it, which peft gets wrong for GPT-2's layers.
    """
    at.within_rank("olora")
    q, r = torch.linalg.qr(at.weight())
    return r[..., : at.rank, :], q[..., : at.rank]
