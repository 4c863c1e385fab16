import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TargetedConfig
from ..core import target
from ..core.layer import Layer
from ..core.method import Method, ModuleMethod, Place, register


@dataclass(frozen=True, kw_only=True)
class LilyConfig(TargetedConfig):
    """A LoRA whose A neighbouring layers share, and whose B is a mixture of some that all layers share."""

    kind = "LILY"

    r: int = 32
    """Rank; 2 to 4 times that of a LoRA."""
    stride_A: int = 1
    """How many layers in a row share one A, of those that have the same name and shape."""
    num_B: int = 2
    """How many B are mixed; all layers of the same name and shape share them."""
    scaling: float = 1.0
    """Scale of the change."""
    init_weights: bool = True
    """True: all B start at zero, so that nothing changes; False: random."""
    routing: str = "token"
    """"token": each token mixes its own B. "batch": the mean over all tokens of a call, as in the field's library,
    whose folders are read so; then a row depends on its batch and on its padding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "stride_A", "num_B")
        self.choice("routing", ("token", "batch"))
        if self.num_B < 2:
            raise ValueError("LilyConfig: num_B=1 leaves nothing to choose; give at least 2, or use LoraConfig.")


@register(LilyConfig)
class Lily(ModuleMethod):
    """y = base(x) + s sum_e p_e B_e A x, p = softmax(R A x)

    Low-Rank Interconnected Adaptation across Layers, Zhong et al. 2024, arXiv:2407.09946. p is each token's own; peft
    takes the mean of all tokens in the batch, padding too, so that an answer depends on what else is asked, and on
    whether there is a cache (`routing="batch"`). The change depends on the input, so it cannot be merged. Use it where
    layers are alike and a LoRA of that size is too narrow. Parameters per site: r num_B; for each name and shape
    r I for every stride_A layers, and num_B r O.
    """

    widens = False
    one_for_all = True

    def __init__(self, config: LilyConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        if layer.kind.name != "linear":
            raise ValueError(
                f"Lily adapts linear layers; {layer.path!r} is a {type(layer.module).__name__} ({layer.kind.name}). "
                "Leave it out of target_modules."
            )
        out_features, in_features = layer.shape
        self.alike = (_name(config.target_modules, layer.path), *layer.shape)
        self.stride, self.scale, self.by_token = config.stride_A, config.scaling, config.routing == "token"
        self.A = nn.Parameter(torch.empty(config.r, in_features))  # (R, I)
        self.B = nn.Parameter(torch.zeros(config.num_B * config.r, out_features))  # (E R, O)
        self.R = nn.Parameter(torch.empty(config.num_B, config.r))  # (E, R)
        for parameter in (self.A, self.R) if config.init_weights else (self.A, self.R, self.B):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        self.later: dict[Any, list[Lily]] = {self.alike: [self]}
        """At the first place of an adapter: those at all of its places, by what they share."""

    @classmethod
    def places(cls, config: LilyConfig, base: nn.Module) -> list[Place]:
        return [Place(path, module) for path, module in target.layers(config, base)]

    def share(self, earlier: Method) -> None:
        if isinstance(earlier, Lily):
            row = earlier.later.setdefault(self.alike, [])
            row.append(self)
            self.B = row[0].B
            self.A = row[(len(row) - 1) // self.stride * self.stride].A

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        h = F.linear(x, self.A.to(x.dtype))  # (..., R)
        p = F.linear(h, self.R.to(x.dtype)).softmax(-1)  # (..., E)
        p = p if self.by_token else p.flatten(0, -2).mean(0)
        mixed = (p[..., None] * h[..., None, :]).flatten(-2)  # (..., E R)
        return torch.add(y, F.linear(mixed, self.B.mT.to(x.dtype)).to(y.dtype), alpha=self.scale)


def _name(targets: Sequence[str] | str | None, path: str) -> str:
    """What layers that share have in common: the target that names them; nothing under a regular expression."""
    if isinstance(targets, str) and targets != "all-linear":
        return ""
    return next((t for t in targets or () if target.suffix_match(path, t)), path.rpartition(".")[2])
