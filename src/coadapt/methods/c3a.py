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


@dataclass(frozen=True, kw_only=True)
class C3AConfig(WeightConfig):
    """A change of the weight whose blocks are circulant: each is one trained row, turned further from row to row."""

    kind = "C3A"
    foreign: ClassVar[Mapping[str, Any]] = {"bias": "none"}

    block_size: int = 256
    """b, which must divide the inputs and the outputs of each target; larger ones have fewer parameters."""
    block_size_pattern: Mapping[str, int] = field(default_factory=dict)
    """Other sizes for some layers: end of a module's name, or a regular expression for it -> size."""
    init_weights: bool | str = "xavier_uniform"
    """"xavier_uniform" (as is False), "kaiming_uniform" or "gaussian"; True: zeros, so that nothing changes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("block_size")
        self.numbers("block_size_pattern")
        self.choice("init_weights", (True, False, "xavier_uniform", "kaiming_uniform", "gaussian"))


@register(C3AConfig)
class C3A(AdditiveMethod):
    """W' = W + C(w) / I, C of blocks C_mn[i, j] = w_mn[(j - i) mod b]

    Parameter-Efficient Fine-Tuning via Circular Convolution, Chen et al. 2024, arXiv:2407.19342. Convolution kernels
    are laid out as (O, I K). At linear layers the product is made by real Fourier transforms, never with the matrix.
    As in peft the change is divided by I and does not start at zero unless `init_weights=True`. Use it where a LoRA's
    rank is the bottleneck: the change has full rank at any size. Parameters per site: O I / b.
    """

    def __init__(self, config: C3AConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.shape = layer.shape
        out, ins = self.shape[0], math.prod(self.shape[1:])
        b = self.size = target.matching(config.block_size_pattern, layer.path, config.block_size)
        self.w = nn.Parameter(torch.zeros(out // b, ins // b, b))  # (O/b, I/b, b)
        match config.init_weights:
            case True:
                return
            case "gaussian":
                nn.init.normal_(self.w)
            case "kaiming_uniform":
                nn.init.uniform_(self.w, -(ins**-0.5), ins**-0.5)
            case _:
                nn.init.uniform_(self.w, -((6 / (ins + out)) ** 0.5), (6 / (ins + out)) ** 0.5)

    @classmethod
    def places(cls, config: C3AConfig, base: nn.Module) -> list[Place]:
        found = super().places(config, base)
        target.check_patterns(config, found, "block_size_pattern")
        for path, out, ins in target.matrices(found, cls.kinds):
            b = target.matching(config.block_size_pattern, path, config.block_size)
            if out % b or ins % b:
                raise ValueError(
                    f"C3AConfig: block_size={b} does not divide the {ins} inputs and {out} outputs of {path!r}. Pick a "
                    f"divisor of {math.gcd(out, ins)}, for this layer by block_size_pattern."
                )
        return found

    def change(self) -> Tensor:
        steps = torch.arange(self.size, device=self.w.device)
        turned = self.w[:, :, (steps - steps[:, None]) % self.size]  # (O/b, I/b, b, b)
        return turned.transpose(1, 2).reshape(self.shape) / (self.w.shape[1] * self.size)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if base.kind.name != "linear":
            return super().forward(x, base)
        y = base(x)
        wide = torch.promote_types(self.w.dtype, torch.float32)  # there are no Fourier transforms in half precision
        waves = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, self.size)))  # (..., I/b, F)
        mixed = torch.einsum("...nf,mnf->...mf", waves, torch.fft.rfft(self.w.to(wide)).conj())
        return y + (torch.fft.irfft(mixed, n=self.size).flatten(-2) / x.shape[-1]).to(y.dtype)
