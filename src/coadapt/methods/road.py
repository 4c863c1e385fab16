from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.layer import Layer
from ..core.lowrank import is_plain
from ..core.method import WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class RoadConfig(WeightConfig):
    """The outputs of layers, rotated and scaled in pairs of features."""

    kind = "ROAD"

    variant: str = "road_1"
    """"road_1": an angle and a scale for each pair; "road_2": for each feature; "road_4": two of each."""
    group_size: int = 64
    """Features come in groups of this size, each in the first half paired with one in the second. An even number that
    divides the outputs of each target."""
    init_weights: bool = True
    """True: nothing changes at the start; False: random angles and scales."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice("variant", ("road_1", "road_2", "road_4"))
        self.positive("group_size")
        if self.group_size % 2:
            raise ValueError(f"RoadConfig: group_size={self.group_size} must be even, since features come in pairs.")


@register(RoadConfig)
class RoAd(WeightMethod):
    """W' = R W, b' = R b, for each pair of outputs R = alpha (cos theta, -sin theta; sin theta, cos theta)

    3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, Liao et al. 2024,
    arXiv:2409.00119. Rows and columns of R have angles and scales of their own in the larger variants. Use it where
    many adapters serve side by side: it costs a product by features, as IA3 does. Parameters per site: O; 2 O and 4 O
    in "road_2" and "road_4".
    """

    widens = False

    def __init__(self, config: RoadConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        outputs, self.variant, self.apart = layer.shape[0], config.variant, config.group_size // 2
        if outputs % config.group_size:
            raise ValueError(
                f"RoAd: group_size={config.group_size} does not divide the {outputs} outputs of {layer.path!r}. Pick "
                "an even divisor of them."
            )
        size = {"road_1": outputs // 2, "road_2": outputs, "road_4": 2 * outputs}[config.variant]
        noise = torch.zeros if config.init_weights else torch.randn
        self.theta = nn.Parameter(0.5 * noise(size))  # (O/2,) ... (2 O,)
        self.alpha = nn.Parameter(1 + 0.5 * noise(size))  # the same

    def columns(self) -> tuple[Tensor, Tensor]:
        """(O,) each: what each feature is multiplied by, and what its partner is."""
        theta, alpha = (p.view(-1, self.apart) for p in (self.theta, self.alpha))
        match self.variant:
            case "road_1":
                cosines = sines = torch.arange(len(theta), device=theta.device).repeat_interleave(2)
            case "road_2":
                cosines = sines = torch.arange(len(theta), device=theta.device)
            case _:
                rows = torch.arange(len(theta), device=theta.device).view(-1, 2, 2)  # of each group two, and two
                cosines, sines = rows[:, 0].flatten(), rows[:, 1].flatten()
        return (alpha[cosines] * theta[cosines].cos()).flatten(), (alpha[sines] * theta[sines].sin()).flatten()

    def partners(self, y: Tensor, dim: int) -> Tensor:
        """For each feature along `dim` the one that it is paired with, negative in first halves."""
        first, second = y.unflatten(dim, (-1, 2, self.apart)).unbind(dim + 1)
        return torch.stack([-second, first], dim + 1).flatten(dim, dim + 2)

    def merge(self, weight: Tensor) -> Tensor:
        straight, crossed = (c.view(-1, *[1] * (weight.dim() - 1)) for c in self.columns())
        return straight * weight + crossed * self.partners(weight, 0)

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None else self.merge(bias)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if not is_plain(base.module):  # its outputs do not see the same inputs
            return super().forward(x, base)
        y, (straight, crossed) = base(x), self.columns()
        return base.scaled(y, straight) + base.scaled(self.partners(y, base.kind.channel % y.dim()), crossed)
