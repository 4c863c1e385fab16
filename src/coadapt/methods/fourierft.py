import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core import target
from ..core.layer import Layer
from ..core.method import AdditiveMethod, Place, register
from ..core.scattered import Places, check_count


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(WeightConfig):
    """A change of the weight with few frequencies, whose coefficients train."""

    kind = "FOURIERFT"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    n_frequency: int = 1000
    """How many coefficients are trained at each layer."""
    scaling: float = 150.0
    """What the change is multiplied by: 100 to 150 for encoders, 300 for decoders and images, in the paper."""
    random_loc_seed: int = 777
    """Seed of the frequencies, which are the same at all layers of one shape."""
    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other numbers for some layers: end of a module's name, or a regular expression for it -> number."""
    init_weights: bool = False
    """True: all coefficients start at zero, so that nothing changes; False: normal, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("n_frequency")
        self.numbers("n_frequency_pattern")


@register(FourierFTConfig)
class FourierFT(AdditiveMethod):
    """W' = W + s Re(IDFT2(F)), F zero but for n coefficients

    Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, Gao et al. 2024, arXiv:2405.03003. Convolution
    kernels are laid out as (O, I K). The coefficients start normal, so that an untrained adapter changes the model,
    as published and as in peft; `init_weights=True` starts from the base. Use it where an adapter must be tiny on
    disk: its size does not grow with the layer's, its computation does. Parameters per site: n.
    """

    def __init__(self, config: FourierFTConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.shape, self.scale = layer.shape, config.scaling
        n = target.matching(config.n_frequency_pattern, layer.path, config.n_frequency)
        self.where = Places(n, math.prod(self.shape), config.random_loc_seed)
        self.c = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))  # (N,)

    @classmethod
    def places(cls, config: FourierFTConfig, base: nn.Module) -> list[Place]:
        found = super().places(config, base)
        target.check_patterns(config, found, "n_frequency_pattern")
        target.check_transposed(config, [place.module for place in found])
        for path, out, ins in target.matrices(found, cls.kinds):
            n = target.matching(config.n_frequency_pattern, path, config.n_frequency)
            check_count("FourierFTConfig", "n_frequency", n, out * ins, path)
        return found

    def change(self) -> Tensor:
        wide = torch.promote_types(self.c.dtype, torch.float32)
        spectrum = self.where(self.c.to(wide)).view(self.shape[0], -1)
        return self.scale * torch.fft.ifft2(spectrum).real.view(self.shape)
