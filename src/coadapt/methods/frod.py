import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import BiasConfig
from ..core.layer import Layer
from ..core.method import Place, WeightMethod, register
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class FrodConfig(BiasConfig):
    """W' = U (S + diag(l)) V^T where W = U diag(l0) V^T; V is the same for the layers of one name, S is sparse."""

    kind = "FROD"
    foreign: ClassVar[Mapping[str, Any]] = {"progressbar": True, "runtime_offload_base_weight": False}

    sparse_rate: float = 0.01
    """Share of the entries of S that train."""
    regularization_alpha: float = 1e-3
    """Added to what is inverted to find V; more, where layers are nearly alike."""
    projection_prng_key: int = 0
    """Seed of which entries of S train."""
    save_projection: bool = True
    """Whether files hold V and which entries train. False: they are made again from the base and the seed."""
    frod_dropout: float = 0.0
    """Share of the inputs that are dropped while training."""
    init_weights: bool = True
    """True: S starts at zero and l at l0, so that nothing changes; False: with noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.probability("frod_dropout")
        if not 0 <= self.sparse_rate <= 1 or self.regularization_alpha < 0:
            raise ValueError("FrodConfig: sparse_rate lies in [0, 1], regularization_alpha is not below 0.")


class Bases(nn.Module):
    """By the name of layers: V (I, I), and which entries of S train, (2, entries)."""

    def __init__(self, config: FrodConfig, places: list[Place]) -> None:
        super().__init__()
        weights: dict[str, dict[tuple[int, int], Tensor]] = {}
        for i, place in enumerate(places):
            at = _number(place.path, i), place.expert or 0
            weights.setdefault(_role(place.site), {})[at] = _matrix(place.layer)
        draws = torch.Generator().manual_seed(config.projection_prng_key)
        self.V, self.entries, self.sizes = nn.Module(), nn.Module(), nn.Module()
        for role in sorted(weights):
            v = _basis([weights[role][number] for number in sorted(weights[role])], config.regularization_alpha)
            size = len(v)
            count = min(int(size * size * config.sparse_rate), size * (size - 1))
            count = max(1, count) if config.sparse_rate > 0 and size > 1 else count
            entries = torch.randperm(size * (size - 1), generator=draws)[:count] if count else torch.empty(0).long()
            rows, columns = entries // max(1, size - 1), entries % max(1, size - 1)
            columns = columns + (columns >= rows)  # counted without the diagonal
            made = {"V": v, "entries": torch.stack([rows, columns]), "sizes": torch.tensor([size, size])}
            for name, value in made.items():
                self.get_submodule(name).register_buffer(role, value, persistent=config.save_projection)


@register(FrodConfig)
class FRoD(WithBiases, WeightMethod):
    """W' = W + U (S + diag(l - l0)) V^T, W = U diag(l0) V^T

    FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees, AAAI 2026, doi:10.1609/aaai.v40i31.39813. U and l0
    follow from W and V, and are found when they are first needed. Here the change is added to W, so that it starts at
    the base to the bit and adds up with others; peft puts U (S + diag(l)) V^T in the place of W. After loading, peft
    keeps a U that belongs to a V of its own making, not to that of the file. To find V takes a decomposition of all
    weights of a name. Use it where a LoRA learns too slowly and memory is no matter: V and U are as large as the
    weights. Parameters per site: I + sparse_rate I^2.
    """

    widens = False
    kinds = ("linear", "conv")

    def __init__(self, config: FrodConfig, layer: Layer, shared: Any = None) -> None:
        super().__init__(config, layer, shared)
        self.role, self.bases, self.layer = _role(layer.site), (shared,), (layer,)  # in tuples: they are others'
        self.dropout, self.state = config.frod_dropout, None
        self.register_buffer("U", None, persistent=False)  # (O, I)
        self.register_buffer("l0", None, persistent=False)  # (I,)
        start = self.apart()[1]
        self.l = nn.Parameter(start.clone())  # (I,)
        self.s = nn.Parameter(start.new_zeros(shared.entries.get_buffer(self.role).shape[1]))  # (entries,)
        if not config.init_weights:
            with torch.no_grad():
                self.l.add_(torch.randn(self.l.shape).to(self.l), alpha=0.1)
                self.s.normal_(std=0.1)

    @classmethod
    def shared(cls, config: FrodConfig, base: nn.Module, places: list[Place]) -> Bases:
        for place in places:  # before all of their weights are taken apart
            cls.check(place.layer)
        return Bases(config, places)

    def basis(self) -> Tensor:
        """V (I, I)"""
        return self.bases[0].V.get_buffer(self.role)

    @torch.no_grad()
    def apart(self) -> tuple[Tensor, Tensor]:
        """U and l0, found anew where V is another, as that of a file."""
        v = self.basis()
        state = v.device, v.dtype, None if v.is_meta else (v.data_ptr(), v._version)
        if self.state != state:
            weight = _matrix(self.layer[0]).double().to(v.device)
            try:
                u = torch.linalg.solve(v.double(), weight.mT).mT
            except RuntimeError:  # layers without an input of their own for some column of V
                u = weight @ torch.linalg.pinv(v.double(), rtol=1e-6).mT
            lengths = torch.linalg.vector_norm(u, dim=0)
            self.U, self.l0 = torch.where(lengths > 1e-12, u / lengths, 0.0).to(v.dtype), lengths.to(v.dtype)
            self.state = state
        return self.U, self.l0

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (O, I), S + diag(l - l0) (I, I) and V (I, I)."""
        u, start = (t.to(self.l) for t in self.apart())
        rows, columns = self.bases[0].entries.get_buffer(self.role).to(self.l.device)
        return u, torch.diag_embed(self.l - start).index_put((rows, columns), self.s), self.basis().to(self.l)

    def change(self) -> Tensor:
        """(O, I K)"""
        u, inner, v = self.parts()
        return u @ inner @ v.mT

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.change().view(weight.shape)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        h = F.dropout(x, self.dropout if self.training else 0.0)
        if base.kind.name != "linear":
            return y + base.apply(h, self.change().view(base.shape)).to(y.dtype)
        u, inner, v = (t.to(x.dtype) for t in self.parts())
        return y + F.linear(F.linear(F.linear(h, v.mT), inner), u).to(y.dtype)


def _matrix(layer: Layer) -> Tensor:
    """The weight of a layer, (O, I K), in fp32."""
    return layer.weight().flatten(1).float()


def _basis(weights: list[Tensor], more: float) -> Tensor:
    """V = R^T E, with the weights stacked to Q R, and E the eigenvectors of mean_i (Q_i^T Q_i)^-1."""
    together = torch.cat(weights)
    if together.shape[0] < together.shape[1]:
        return torch.linalg.svd(together, full_matrices=True)[2].mT.contiguous()
    q, r = torch.linalg.qr(together)
    eye = more * torch.eye(len(r), dtype=r.dtype, device=r.device)
    inverses = [torch.linalg.inv(part.mT @ part + eye) for part in q.split([len(w) for w in weights])]
    total = torch.zeros_like(r)
    for inverse in inverses:
        total = total + inverse
    return r.mT @ torch.linalg.eigh(total / len(inverses))[1]


def _role(path: str) -> str:
    """What layers of different blocks that share V have in common, as the field names it in files."""
    *above, last = path.split(".")
    if not above or above[-1].isdigit():
        return last
    if above[-2:] == ["attention", "output"] and last == "dense":
        return "attention_output"
    return f"{above[-1]}_{last}"


def _number(path: str, otherwise: int) -> int:
    """Of the block that a layer lies in."""
    found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", path) or re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(found[1]) if found else otherwise
