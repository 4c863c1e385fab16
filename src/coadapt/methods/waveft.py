import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WeightConfig
from ..core import target
from ..core.layer import Layer
from ..core.method import AdditiveMethod, Place, register
from ..core.scattered import Places, check_count
from ..core.wavelets import scaling_filter, synthesis


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(WeightConfig):
    """A change of the weight with few wavelet coefficients, which train."""

    kind = "WAVEFT"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    n_frequency: int = 2592
    """How many coefficients are trained at each layer."""
    scaling: float = 25.0
    """What the change is multiplied by."""
    wavelet_family: str = "db1"
    """db1 (Haar's) to db20; others (sym2, coif1 ...) by their names in PyWavelets, if that is installed."""
    use_idwt: bool = True
    """False: the coefficients are entries of the weight themselves."""
    random_loc_seed: int = 777
    """Seed of the coefficients' places, which are the same at all layers of one shape."""
    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other numbers for some layers: end of a module's name, or a regular expression for it -> number."""
    proportional_parameters: bool = False
    """Give each layer its share of all coefficients by its size, and not the same number."""
    init_weights: bool = True
    """True: all coefficients start at zero, so that nothing changes; False: normal with spread 0.01."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("n_frequency")
        self.numbers("n_frequency_pattern")
        if self.use_idwt:
            scaling_filter(self.wavelet_family)
        elif self.wavelet_family != "db1":
            raise ValueError("WaveFTConfig: wavelet_family has no effect with use_idwt=False.")
        if self.proportional_parameters and self.n_frequency_pattern:
            raise ValueError("WaveFTConfig: n_frequency_pattern has no effect with proportional_parameters=True.")


@register(WaveFTConfig)
class WaveFT(AdditiveMethod):
    """W' = W + s IDWT2(C), C zero but for n coefficients

    Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, Bilican et al. 2025, arXiv:2505.12532. One
    level; with longer wavelets C is larger than W, and what the transform gives is cut to it, as in peft. Convolution
    kernels are laid out as (O, I K). Use it where FourierFT fits and changes should be local, as in text-to-image
    personalisation. Parameters per site: n.
    """

    def __init__(self, config: WaveFTConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.shape, self.scale = layer.shape, config.scaling
        n = target.matching(config.n_frequency_pattern, layer.path, int(layer.role or config.n_frequency))
        self.where = Places(n, math.prod(self.shape), config.random_loc_seed)
        self.lowpass = scaling_filter(config.wavelet_family) if config.use_idwt else None
        self.c = nn.Parameter(torch.zeros(n) if config.init_weights else 0.01 * torch.randn(n))  # (N,)

    @classmethod
    def places(cls, config: WaveFTConfig, base: nn.Module) -> list[Place]:
        found = super().places(config, base)
        target.check_patterns(config, found, "n_frequency_pattern")
        target.check_transposed(config, [place.module for place in found])
        if not config.proportional_parameters:
            for path, out, ins in target.matrices(found, cls.kinds):
                n = target.matching(config.n_frequency_pattern, path, config.n_frequency)
                check_count("WaveFTConfig", "n_frequency", n, out * ins, path)
            return found
        sizes = {path: out * ins for path, out, ins in target.matrices(found, cls.kinds)}
        each = {p: config.n_frequency * len(sizes) * size / sum(sizes.values()) for p, size in sizes.items()}
        for path, size in sizes.items():
            check_count("WaveFTConfig", "n_frequency", round(each[path]), size, path)
        return [replace(p, role=str(max(1, round(each.get(p.path, 1))))) for p in found]

    def change(self) -> Tensor:
        entries = self.where(self.c).view(self.shape[0], -1)  # (O, I)
        if self.lowpass is None:
            return self.scale * entries.view(self.shape)
        longer = len(self.lowpass) - 2
        rows, columns = (longer + n + n % 2 for n in entries.shape)  # of C, even
        up, left = (rows - entries.shape[0]) // 2, (columns - entries.shape[1]) // 2
        padded = F.pad(entries, (left, columns - entries.shape[1] - left, up, rows - entries.shape[0] - up))
        # The field's files have the details of rows where those of columns are as a rule, and the other way round.
        halves = padded.view(2, rows // 2, 2, columns // 2).transpose(0, 2).reshape(rows, columns)
        across = synthesis(halves, self.lowpass, entries.shape[1])
        return self.scale * synthesis(across.mT, self.lowpass, entries.shape[0]).mT.reshape(self.shape)
