from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import TargetedConfig
from ..core import roles, target
from ..core.adapter import ModuleCopy
from ..core.layer import Layer, kind_of
from ..core.method import Companion, Place, WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(TargetedConfig):
    """b' = b + delta at the layers that have a bias."""

    kind = "BITFIT"


@register(BitFitConfig)
class BitFit(WeightMethod):
    """b' = b + delta

    BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, Ben Zaken et al. 2021,
    arXiv:2106.10199. The change is stored, not the bias, so that several add up. Use it where next to nothing may be
    stored, and the model has biases. Parameters per site: O.
    """

    widens = False
    kinds = ("linear", "embedding", "conv", "norm")

    def __init__(self, config: Any, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        if not hasattr(layer.module, "bias"):
            raise ValueError(
                f"BitFit changes biases; {layer.path!r} is a {type(layer.module).__name__}, which cannot have one."
            )
        self.delta = nn.Parameter(torch.zeros(layer.shape[0]))  # (O,)

    @classmethod
    def places(cls, config: BitFitConfig, base: nn.Module) -> list[Place]:
        return [Place(p, m) for p, m in target.layers(config, base, roles.with_bias(base))]

    def merge(self, weight: Tensor) -> Tensor:
        return weight

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        return self.delta if bias is None else bias + self.delta

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        return y + base.along_channels(self.delta.to(y.dtype), y)


class WithBiases:
    """Mixed into a method whose configuration has a field `bias`: "none", "all", or "<method>_only"."""

    reads_bias: ClassVar[bool] = False
    """Whether the method does something to the bias itself, which is then the trained one, as in the field."""

    @classmethod
    def companions(cls, config: Any, base: nn.Module, places: list[Place]) -> list[Companion]:
        inherited: list[Companion] = super().companions(config, base, places)  # type: ignore[misc]
        if config.bias == "none":
            return inherited
        copied = {m for place in ModuleCopy.places(config, base) for m in place.module.modules()}
        with_bias = {p: m for p in roles.with_bias(base) if (m := base.get_submodule(p)) not in copied}
        found = [Place(p, m) for p, m in with_bias.items()] if config.bias == "all" else places
        found = [p for p in found if p.path in with_bias and kind_of(p.module) is not None]
        if not found:
            who = type(config).__name__
            raise ValueError(f"{who}: bias={config.bias!r}, but none of the layers concerned has a bias.")
        return [*inherited, Companion(BitFit, BitFitConfig(), found, below=cls.reads_bias)]
