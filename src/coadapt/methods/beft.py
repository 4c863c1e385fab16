from dataclasses import dataclass

from torch import nn

from ..config import TargetedConfig
from ..core import roles, target
from ..core.layer import Layer
from ..core.method import Place, register
from .bitfit import BitFit


@dataclass(frozen=True, kw_only=True)
class BeftConfig(TargetedConfig):
    """b' = b + delta where values are made, whether there is a bias yet or not."""

    kind = "BEFT"

    init_weights: bool = True
    """True: the change starts at zero; False: normal."""


@register(BeftConfig)
class BEFT(BitFit):
    """b' = b + delta, of the projections that make values

    BEFT: Bias-Efficient Fine-Tuning of Language Models, Huang et al. 2025, arXiv:2509.15974. As BitFit, at the one bias
    of each attention that the paper finds to matter most; layers without a bias get one, also when they are merged,
    which peft refuses. Use it where even BitFit is too large, with little data. Parameters per site: O.
    """

    def __init__(self, config: BeftConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        if not config.init_weights:
            nn.init.normal_(self.delta)

    @classmethod
    def places(cls, config: BeftConfig, base: nn.Module) -> list[Place]:
        return [Place(path, module) for path, module in target.layers(config, base, roles.values(base))]
