from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..config import InputConfig
from ..core.backbone import Backbone
from ..core.method import InputMethod, Reparametrization, register


@dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(InputConfig):
    """Virtual tokens that a small network makes while it trains."""

    kind = "P_TUNING"

    encoder_reparameterization_type: str | None = "MLP"
    """"MLP" (three dense layers) or "LSTM" (bidirectional, then two dense layers). None: no network, the tokens
    themselves, which is all that a file for inference holds."""
    encoder_hidden_size: int | None = None
    """Width of the network; left out, that of the embeddings."""
    encoder_num_layers: int = 2
    """Layers of the LSTM."""
    encoder_dropout: float = 0.0
    """Between the layers of the LSTM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        if kind is not None:  # an enumeration's member, or its text
            kind = str(kind).rpartition(".")[2]
            object.__setattr__(self, "encoder_reparameterization_type", kind)
        self.choice("encoder_reparameterization_type", ("MLP", "LSTM", None))
        self.positive("encoder_hidden_size", "encoder_num_layers")
        self.probability("encoder_dropout")
        self.no_effect("encoder_hidden_size", kind is None, "without an encoder")
        if kind != "LSTM" and (self.encoder_num_layers != 2 or self.encoder_dropout):
            raise ValueError(
                "PromptEncoderConfig: encoder_num_layers and encoder_dropout are of the LSTM; they have no effect with "
                f"encoder_reparameterization_type={kind!r}."
            )

    def for_inference(self) -> Self:
        if self.encoder_reparameterization_type is None:
            return self
        none: dict[str, Any] = {"encoder_reparameterization_type": None, "encoder_hidden_size": None}
        return replace(self, **none, encoder_num_layers=2, encoder_dropout=0.0)


class PromptEncoder(Reparametrization):
    """All virtual tokens of an adapter, (sites N, D), from an embedding of that shape."""

    def __init__(self, config: PromptEncoderConfig, tokens: int, width: int) -> None:
        super().__init__()
        inner = config.encoder_hidden_size or width
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.lstm: nn.LSTM | None = None
        if config.encoder_reparameterization_type == "LSTM":
            options: dict[str, Any] = {"num_layers": config.encoder_num_layers, "dropout": config.encoder_dropout}
            self.lstm = nn.LSTM(width, inner, bidirectional=True, batch_first=True, **options)
            inner *= 2
        first = nn.Identity() if self.lstm is not None else nn.Sequential(nn.Linear(width, inner), nn.ReLU())
        self.mlp = nn.Sequential(first, nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width))

    def forward(self) -> Tensor:
        states = self.embedding if self.lstm is None else self.lstm(self.embedding[None])[0][0]
        return self.mlp(states)


@register(PromptEncoderConfig)
class PTuning(InputMethod):
    """base([P; e]), P = MLP(E) or MLP(LSTM(E))

    GPT Understands, Too, Liu et al. 2021, arXiv:2103.10385. Use it where a prompt alone is slow to learn. Parameters
    per site: N D; in training the encoder's, too.
    """

    def __init__(
        self, config: PromptEncoderConfig, place: Backbone, base: Any, shared: PromptEncoder | None = None
    ) -> None:
        super().__init__(config, place, base, shared)
        n = config.num_virtual_tokens
        number = [p.path for p in self.places(config, base)].index(place.path)
        self.encoder = (shared, slice(number * n, number * n + n)) if shared is not None else None
        if shared is None:
            self.P = nn.Parameter(torch.zeros(n, place.width))  # (N, D)

    @classmethod
    def shared(cls, config: PromptEncoderConfig, base: nn.Module, places: list[Any]) -> nn.Module | None:
        if config.encoder_reparameterization_type is None:
            return None
        return PromptEncoder(config, len(places) * config.num_virtual_tokens, places[0].width)

    @classmethod
    def facts(cls, config: PromptEncoderConfig, base: Any) -> dict[str, Any]:
        found = super().facts(config, base)
        return {**found, "encoder_reparameterization_type": "MLP", "encoder_hidden_size": found["token_dim"]}

    def prompt(self) -> Tensor:
        if self.encoder is None:
            return self.P
        encoder, mine = self.encoder
        return encoder()[mine]
