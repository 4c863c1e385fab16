import torch

from . import Pair, Site, start


@start("orthogonal")
def orthogonal(at: Site) -> Pair:
    """A = Q1ᵀ G / 10 and B = H Q2 / 10, with the odd and the even rows Q1 and Q2 of a random orthogonal matrix

    So B A is zero to rounding, and both factors train at once, each away from what the other spans. As the field's
    library has it; it has no paper. r must be even.
    """
    if at.rank % 2:
        raise ValueError(
            f"LoraConfig: init_lora_weights='orthogonal' halves the ranks, so r must be even; {at.layer.path!r} "
            f"has r={at.rank}."
        )
    *experts, out, inside = at.shape
    q = torch.linalg.qr(torch.randn(*experts, at.rank, at.rank)).Q
    a = torch.randn(*experts, inside, at.rank // 2) @ q[..., 0::2, :]
    b = torch.randn(*experts, at.rank // 2, out).mT @ q[..., 1::2, :]
    return a.mT / 10, b / 10
