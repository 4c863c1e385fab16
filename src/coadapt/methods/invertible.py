from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..core import roles, target
from ..core.activation import activations
from ..core.backbone import backbones
from ..core.layer import Layer
from ..core.method import Method, ModuleMethod, register
from ..core.precision import linear
from ..core.roles import Place


@dataclass(frozen=True, kw_only=True)
class InvertibleConfig(PeftConfig):
    """A coupling of features behind the input embedding, and its exact inverse before the output embedding."""

    kind = "INVERTIBLE"

    reduction_factor: float = 2.0
    """Half of the embedding's features / width of the two networks."""
    non_linearity: str = "relu"
    """Inside of the two networks; any activation that transformers knows by name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice("non_linearity", tuple(activations()))
        self.above_zero("reduction_factor")


@register(InvertibleConfig)
class Invertible(ModuleMethod):
    """f(base(x)) at the embedding, base(f^-1(x)) at the head; f([a; b]) = [a'; b + G(a')], a' = a + F(b)

    MAD-X, Pfeiffer et al. 2020, arXiv:2005.00052, with the coupling of NICE, arXiv:1410.8516. F and G are U act(D z);
    here with biases, U at zero in the beginning, so that a new adapter changes nothing. f stands right behind the
    embedding of the tokens, before positions and norms; virtual tokens and `inputs_embeds` do not pass it. One F and
    one G serve all places of an adapter (an encoder-decoder has two embeddings). A model without an output embedding, a
    classifier, has no inverse. Use it as the part of a language adapter that moves embeddings. Parameters per site: 2 D
    m + 2 m + D for all of them together.
    """

    one_for_all = True
    widens = False

    def __init__(self, config: InvertibleConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.inverts = layer.role == "head"
        width = layer.shape[self.inverts]  # D: of what an embedding gives, of what a head is given
        self.halves = a, b = width // 2, width - width // 2
        inner = max(1, round(a / config.reduction_factor))
        self.F = nn.Sequential(nn.Linear(b, inner), activations()[config.non_linearity], nn.Linear(inner, a))
        self.G = nn.Sequential(nn.Linear(a, inner), activations()[config.non_linearity], nn.Linear(inner, b))
        for up in (*self.F[2].parameters(), *self.G[2].parameters()):
            nn.init.zeros_(up)
        self.earlier: tuple[Any, ...] = ()

    @classmethod
    def places(cls, config: InvertibleConfig, base: Any) -> list[Place]:
        embeddings = {place.embedding: "" for place in backbones(base)}
        heads = {m: "head" for m in roles.word_embeddings(base) if not isinstance(m, nn.Embedding)}
        places = [Place(roles.path_of(base, m), m, role=role) for m, role in {**embeddings, **heads}.items()]
        widths = {p.path: Layer(p.module, p.path).shape[p.role == "head"] for p in places}
        if len(set(widths.values())) > 1:
            raise ValueError(f"InvertibleConfig: embeddings and head must have as many features; here are {widths}.")
        if both := [p for p in widths for name in config.modules_to_save or () if target.suffix_match(p, name)]:
            raise ValueError(
                f"InvertibleConfig: {both} are in modules_to_save, whose copy would be called in the place of this. "
                'Put the copy in an adapter of its own, below this one: "copy >> language".'
            )
        return places

    def share(self, earlier: Method) -> None:
        del self.F, self.G
        self.earlier = (earlier,)  # in a tuple: its parameters stay where they are

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        own: Invertible = self.earlier[0] if self.earlier else self
        return base(own.inverse(x)) if self.inverts else own.coupled(base(x))

    def coupled(self, e: Tensor) -> Tensor:
        """f: (..., D) -> (..., D)"""
        a, b = e.split(self.halves, dim=-1)
        a = a + _made(self.F, b)
        return torch.cat([a, b + _made(self.G, a)], dim=-1)

    def inverse(self, o: Tensor) -> Tensor:
        """f^-1: (..., D) -> (..., D)"""
        a, b = o.split(self.halves, dim=-1)
        b = b - _made(self.G, a)
        return torch.cat([a - _made(self.F, b), b], dim=-1)


def _made(network: Any, z: Tensor) -> Tensor:
    """U act(D z), in the dtype of z."""
    down, act, up = network
    return linear(up, act(linear(down, z)))
