"""LoftQ's start, and the quantisers that it works against: NF4 by blocks (QLoRA, arXiv:2305.14314) and int8 by rows."""

import torch
from torch import Tensor

from . import Pair

BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, its appendix E."""


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and the largest size in each block. (O, I) -> int8 (O, I) and (O, 1); in four bits uint8, two in each."""
    if bits == 8:
        most = weight.abs().amax(1, keepdim=True)
        return (weight / most.clamp(min=1e-12) * 127).round().to(torch.int8), most
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    most = flat.abs().amax(1, keepdim=True)
    table = torch.tensor(NF4, device=weight.device, dtype=weight.dtype)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(flat / most.clamp(min=1e-12), middles).to(torch.uint8).view(-1, 2)
    return codes[:, 0] * 16 + codes[:, 1], most


def dequantised(codes: Tensor, most: Tensor, shape: tuple[int, int]) -> Tensor:
    """(O, I): undoes `quantised`, as far as that can be."""
    if codes.dtype == torch.int8:
        return codes.to(most.dtype) * (most / 127)
    table = torch.tensor(NF4, device=most.device, dtype=most.dtype)
    both = torch.stack([codes // 16, codes % 16], dim=1).long()
    return (table[both].view(-1, BLOCK) * most).flatten()[: shape[0] * shape[1]].view(shape)


def loftq(weight: Tensor, bits: int, rank: int, scale: float, steps: int) -> tuple[Pair, Tensor, Tensor]:
    """A and B, and the codes of Q, with Q + s B A near to W: each in turn is the best for the other.

    LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, Li et al. 2023, arXiv:2310.08659.
    """
    left = weight
    for _ in range(steps):
        codes, most = quantised(left, bits)
        apart = weight - dequantised(codes, most, (weight.shape[0], weight.shape[1]))
        u, s, vh = torch.linalg.svd(apart, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        a, b = root[:, None] * vh[:rank], u[:, :rank] * root
        left = weight - scale * b @ a
    return (a, b), codes, most  # pyright: ignore[reportPossiblyUnboundVariable]
