"""How many directions an adapter uses: the effective rank of what it changes, from its factors."""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from coadapt.core.adapter import Adapter
from coadapt.core.lowrank import LowRankMethod
from coadapt.core.method import AttentionMethod, InputMethod, Reparametrization
from coadapt.methods.bottleneck import Bottleneck

SITES, FEW, WIDE = 32, 4, 64
"""At so many sites it is worked out, drawn once and the same at every step; at so few where there are many adapters, or
where factors have more than `WIDE` columns: the work grows with the cube of that."""
EXPERTS = 8
"""So many experts of a fused mixture, at each site."""

Factors = tuple[Tensor, Tensor | None]
"""B (..., O, R) and A (..., R, I) of a product; or a matrix (N, D) by itself."""


def effective_rank(singular: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i), p_i = s_i / sum_j s_j: 1 for one direction, R for R that are equally strong.

    The effective rank: a measure of effective dimensionality, Roy & Vetterli, EUSIPCO 2007.

    Args:
        singular: (..., R), not all 0.
    """
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def singular_values(factors: Factors) -> Tensor:
    """(..., R) of B A, ascending, without making (O, I).

    With BᵀB = V W Vᵀ they are the roots of the eigenvalues of √W Vᵀ (A Aᵀ) V √W, which is (R, R). As a QR of both
    factors gives, but of large matrices there are only products, and what is small goes to the CPU. In float64, since
    squares have half of the digits.
    """
    b, a = (None if f is None else _wide(f.detach()) for f in factors)
    assert b is not None
    if a is None:
        b = b if b.shape[-2] > b.shape[-1] else b.mT
        squares = torch.linalg.eigvalsh((b.mT @ b).cpu())
    else:
        values, vectors = torch.linalg.eigh((b.mT @ b).cpu())
        root = vectors * values.clamp(min=0).sqrt()[..., None, :]
        squares = torch.linalg.eigvalsh(root.mT @ (a @ a.mT).cpu() @ root)
    return squares.clamp(min=0).sqrt()


def _wide(factor: Tensor) -> Tensor:
    return (factor.cpu() if factor.device.type == "mps" else factor).double()  # Apple's devices have no float64


@torch.no_grad()
def rank_of(adapter: Adapter, sites: int = SITES) -> float | None:
    """The mean effective rank over the adapter's sites, or None where there is nothing to measure.

    Of the change that all of its training made, not only this run's: W' - W = s B A of low-rank methods (of DoRA
    without the lengths); U D of a bottleneck, as if nothing stood between; the virtual tokens (N, D) of a prompt; keys
    beside values (N, 2 H D) of a prefix. So no copy of the start is needed, and a resumed run gives what the unbroken
    one gives. A site that is 0 so far has none, nor have vectors, copies of modules, trained tokens, and what a network
    makes while it trains.

    Args:
        sites: at most so many are measured.
    """
    if isinstance(adapter.shared, Reparametrization):
        return None
    with_factors = [part.method for part in adapter.parts if has_factors(part.method)]
    found = [rank for method in _drawn(with_factors, sites) for rank in _ranks(method)]
    return sum(found) / len(found) if found else None


def has_factors(method: nn.Module) -> bool:
    """Whether `rank_of` counts this method."""
    return isinstance(method, Bottleneck | InputMethod | AttentionMethod) or _low_rank(method) is not None


def _drawn(methods: Sequence[nn.Module], sites: int) -> Sequence[nn.Module]:
    # By chance: every seventh of seven linear layers a block would always be a query.
    wide = any(_columns(method) > WIDE for method in methods)
    sites = min(sites, FEW) if wide else sites
    return methods if len(methods) <= sites else random.Random(0).sample(methods, sites)


def _columns(method: nn.Module) -> int:
    lora = _low_rank(method)
    if lora is not None:
        return lora.factors()[1].shape[-1]
    return method.down.out_features if isinstance(method, Bottleneck) else 0


def _low_rank(method: nn.Module) -> LowRankMethod | None:
    """The method itself, or the one inside of it (DoRA's)."""
    return next((m for m in (method, *method.children()) if isinstance(m, LowRankMethod)), None)


def _ranks(method: nn.Module) -> Iterator[float]:
    singular = singular_values(_factors(method))
    for one in singular.reshape(-1, singular.shape[-1]):
        if one[-1] > 0:
            yield float(effective_rank(one))


def _factors(method: nn.Module) -> Factors:
    match method:
        case Bottleneck():
            return method.up.weight, method.down.weight
        case InputMethod():
            return method.prompt(), None
        case AttentionMethod():
            keys, values = method.prefix()  # each (H, N, D)
            return torch.cat([keys, values]).transpose(0, 1).flatten(1), None
        case _:
            low_rank = _low_rank(method)
            assert low_rank is not None
            a, b, _ = low_rank.factors()
            if b.dim() == 3:  # (E, R, I) and (E, O, R) of experts
                step = -(-len(b) // EXPERTS)
                return b[::step], a[::step]
            return b, a.flatten(1)
