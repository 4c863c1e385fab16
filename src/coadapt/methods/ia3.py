from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config import TransposedConfig, WeightConfig
from ..core import roles, target
from ..core.layer import Layer, kind_of
from ..core.method import Place, WeightMethod, register
from ..core.mixture import mixtures


@dataclass(frozen=True, kw_only=True)
class IA3Config(WeightConfig, TransposedConfig):
    """Keys, values and the inner states of feed-forward parts, each feature multiplied by a trained number."""

    kind = "IA3"

    feedforward_modules: Sequence[str] | str | None = None
    """Targets whose input is rescaled and not their output, named as in `target_modules`. Left out, those that end the
    feed-forward part of a block."""
    init_ia3_weights: bool = True
    """True: all numbers start at 1, so that nothing changes; False: random."""


FEED_FORWARD = "feed-forward"
"""The role of the places whose input is rescaled."""


@register(IA3Config)
class IA3(WeightMethod):
    """W' = diag(l) W; where a feed-forward part ends W' = W diag(l)

    Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, Liu et al. 2022,
    arXiv:2205.05638. Use it with few examples, and for thousands of adapters at once. Parameters per site: O, or I.
    """

    widens = False

    def __init__(self, config: IA3Config, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.on_input = layer.role == FEED_FORWARD
        size = layer.shape[1] if self.on_input else layer.shape[0]
        self.l = nn.Parameter(torch.ones(size) if config.init_ia3_weights else torch.randn(size))  # (I,) or (O,)

    @classmethod
    def places(cls, config: IA3Config, base: nn.Module) -> list[Place]:
        last = [block.feed_forward[1] for block in roles.blocks(base) if block.feed_forward]
        ends = [path for path, module in last if kind_of(module) is not None]  # a mixture of experts is no layer
        of_experts = [f"{m.experts}.{m.raw[-1]}" for m in mixtures(base) if m.raw]
        chosen = {*roles.keys_and_values(base), *ends}
        usual = [path for path, _ in base.named_modules() if path in chosen]  # as when it is loaded, for optimisers
        found = target.places(config, base, cls.kinds, usual)
        target.check_transposed(config, [place.module for place in found])
        inputs = target.among(config, "feedforward_modules", [place.path for place in found], [*ends, *of_experts])
        return [replace(place, role=FEED_FORWARD if place.path in inputs else "") for place in found]

    def merge(self, weight: Tensor) -> Tensor:
        along = (1, -1) if self.on_input else (-1, 1)
        return weight * self.l.view(*along, *[1] * (weight.dim() - 2))

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.on_input else bias * self.l

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if self.on_input:
            return base(base.scaled(x, self.l)) if x.is_floating_point() else super().forward(x, base)
        return base.scaled(base(x), self.l)
