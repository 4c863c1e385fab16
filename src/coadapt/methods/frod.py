import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import BiasConfig, TransposedConfig
from ..core.decompositions import common_basis
from ..core.layer import Layer
from ..core.method import Place, WeightMethod, register
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class FrodConfig(BiasConfig, TransposedConfig):
    """W' = U (S + diag(l)) V^T where W = U diag(l0) V^T; V is the same for the layers of one name, S is sparse."""

    kind = "FROD"
    foreign: ClassVar[Mapping[str, Any]] = {"progressbar": True}
    unread: ClassVar[Mapping[str, str]] = {
        "progressbar": "no bar is shown",
        "runtime_offload_base_weight": "the base stays in use, for other adapters and without them",
    }

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
            v = common_basis([weights[role][number] for number in sorted(weights[role])], config.regularization_alpha)
            entries = _entries(len(v), config.sparse_rate, draws)
            for name, value in {"V": v, "entries": entries, "sizes": torch.tensor(v.shape)}.items():
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
        self.role, self.layer = _role(layer.site), (layer,)  # in a tuple: it is the base's
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
        return self.bank.V.get_buffer(self.role)

    @torch.no_grad()
    def apart(self) -> tuple[Tensor, Tensor]:
        """U and l0, found anew where V is another, as that of a file."""
        if torch.compiler.is_compiling() and self.state is not None:
            return self.U, self.l0
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

    def refresh(self) -> None:
        self.apart()

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (O, I), S + diag(l - l0) (I, I) and V (I, I)."""
        u, start = (t.to(self.l) for t in self.apart())
        rows, columns = self.bank.entries.get_buffer(self.role).to(self.l.device)
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


def _entries(size: int, share: float, draws: torch.Generator) -> Tensor:
    """(2, entries): rows and columns of a share of a square matrix, of at least one, off its diagonal."""
    off = size * (size - 1)
    count = min(int(size * size * share), off)
    count = max(1, count) if share > 0 and off else count
    chosen = torch.randperm(off, generator=draws)[:count] if count else torch.empty(0).long()
    rows, columns = chosen // max(1, size - 1), chosen % max(1, size - 1)
    return torch.stack([rows, columns + (columns >= rows)])  # counted without the diagonal


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
