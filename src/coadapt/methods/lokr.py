import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LycorisConfig
from ..core import target
from ..core.layer import Layer
from ..core.method import WeightMethod, register
from .loha import thinned


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """W' = W + (alpha / r) C kron D at the layers that are targeted; D is a product of rank r, or a full matrix."""

    kind = "LOKR"

    decompose_both: bool = False
    """Also write C as a product of rank r, where r is below half of its size."""
    decompose_factor: int = -1
    """The size of C, where that divides the layer's, or the largest divisor below; -1: as square as possible."""
    rank_dropout_scale: bool = False
    """Scale up what `rank_dropout` keeps."""
    init_weights: bool | str = True
    """True: C starts at zero, so that nothing changes; "lycoris": D does; False: all random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice("init_weights", (True, False, "lycoris"))
        if self.decompose_factor != -1:
            self.positive("decompose_factor")
        self.no_effect("rank_dropout_scale", not self.rank_dropout, "without rank_dropout")


@register(LoKrConfig)
class LoKr(WeightMethod):
    """W' = W + (alpha / r) C kron D, D = Db Da

    KronA: Parameter Efficient Tuning with Kronecker Adapter, Edalati et al. 2022, arXiv:2212.10650; in this form
    LyCORIS, Yeh et al. 2023, arXiv:2309.14859. D is a full matrix where r is not below half of its size; the scale is
    alpha / r there, too, as in peft. At linear layers the two are applied one after the other, and their product is
    never made. Where kernels of one dim have a full D, peft's product runs over other axes than the channels; that is
    kept, since it is what such files mean. Use it for changes of full rank in small files. Parameters per site, with
    C (l, m) and D (k, n K), O = l k and I = m n: l m + r (k + n K).
    """

    widens = False
    C: Tensor  # (l, m)
    Cb: Tensor | None  # (l, R); then Ca (R, m)
    Ca: Tensor
    D: Tensor  # (k, n, *K)
    Db: Tensor | None  # (k, R); then Da (R, n K), or with a core T (R, R, *K) (R, k) and (R, n)
    Da: Tensor
    T: Tensor | None

    def __init__(self, config: LoKrConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        r = target.matching(config.rank_pattern, layer.path, config.r)
        self.scale = target.matching(config.alpha_pattern, layer.path, config.alpha) / r
        self.drop = config.rank_dropout, config.module_dropout, config.rank_dropout_scale
        out_features, in_features, *kernel = self.shape = layer.shape
        (left, k), (m, n) = (_split(size, config.decompose_factor) for size in (out_features, in_features))
        self.inner = k, n, *kernel
        both, full = config.decompose_both and r < max(left, m) / 2, r >= max(k, n) / 2
        core = config.use_effective_conv2d and math.prod(kernel) > 1
        sizes: dict[str, tuple[int, ...]] = {"Cb": (left, r), "Ca": (r, m)} if both else {"C": (left, m)}
        if full:
            sizes["D"] = self.inner
        elif core:
            sizes |= {"Db": (r, k), "Da": (r, n), "T": (r, r, *kernel)}
        else:
            sizes |= {"Db": (k, r), "Da": (r, n * math.prod(kernel))}
        for name in ("C", "Cb", "Ca", "D", "Db", "Da", "T"):
            made = nn.Parameter(torch.empty(sizes[name])) if name in sizes else None
            if made is not None:
                nn.init.kaiming_uniform_(made, a=math.sqrt(5))
            self.register_parameter(name, made)
        if config.init_weights:
            first = ("D" if full else "Da") if config.init_weights == "lycoris" else ("Cb" if both else "C")
            nn.init.zeros_(self.get_parameter(first))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """C (l, m) and D (k, n, *K)."""
        own: Any = self
        c = own.C if own.Cb is None else own.Cb @ own.Ca
        if own.T is not None:
            return c, torch.einsum("pq...,pk,qn->kn...", own.T, own.Db, own.Da)
        return c, own.D if own.Db is None else (own.Db @ own.Da).view(self.inner)

    def change(self) -> Tensor:
        """(O, I, *K)"""
        c, d = self.matrices()
        axes = "lm,knj->klnmj" if self.D is not None and d.dim() == 3 else "lm,kn...->lkmn..."
        return self.scale * torch.einsum(axes, c, d).reshape(self.shape)

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.change()

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        if base.kind.name == "linear":
            c, d = (t.to(x.dtype) for t in self.matrices())
            blocks = x.unflatten(-1, (c.shape[1], -1))  # (..., m, n)
            change = self.scale * torch.einsum("...mn,lm,kn->...lk", blocks, c, d).flatten(-2)
        else:
            change = base.apply(x, self.change())
        changed = y + change.to(y.dtype)
        return thinned(y, changed, base, *self.drop) if self.training else changed


def _split(size: int, most: int) -> tuple[int, int]:
    """Two factors of `size`: the first is `most` if that divides it, else the largest divisor up to it and the root."""
    if most > 0 and size % most == 0:
        return most, size // most
    limit = math.isqrt(size) if most < 0 else min(most, math.isqrt(size))
    first = next(d for d in range(limit, 0, -1) if size % d == 0)
    return first, size // first
