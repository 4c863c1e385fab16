import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import BiasConfig
from ..core.layer import Layer
from ..core.method import WeightMethod, register
from .bitfit import WithBiases


@dataclass(frozen=True, kw_only=True)
class GloraConfig(BiasConfig):
    """Weights and biases, each scaled and shifted, and biases shifted by weights."""

    kind = "GLORA"

    r: int = 8
    """Rank of what is "lora"."""
    config_A_B: str = "lora"
    """What scales (A) and shifts (B) the weight: "lora", "vector" (a number for each output), "constant" or "none"."""
    config_C: str = "lora"
    """Of the weight, what is added to a bias: "lora", "vector" (a number for each input) or "none"."""
    config_D_E: str = "constant"
    """What scales (D) and shifts (E) a bias: "vector", "constant" or "none"."""
    init_weights: bool = True
    """True: nothing changes at the start; False: random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.choice("config_A_B", ("lora", "vector", "constant", "none"))
        self.choice("config_C", ("lora", "vector", "none"))
        self.choice("config_D_E", ("vector", "constant", "none"))


class Support(nn.Module):
    """One of A ... E, of the form that its configuration says: (rows, columns), or what broadcasts to it."""

    def __init__(self, form: str, shape: tuple[int, ...], r: int, zero: bool) -> None:
        super().__init__()
        if form == "lora":
            self.Xd = nn.Parameter(torch.zeros(shape[0], r))
            self.Xu = nn.Parameter(torch.empty(r, shape[1]))
            nn.init.kaiming_uniform_(self.Xu, a=math.sqrt(5))
        else:
            sizes = {"vector": (shape[0], *[1] * (len(shape) - 1)), "constant": (1,)}
            self.X = nn.Parameter(torch.zeros(sizes[form]))
        if not zero:
            nn.init.normal_(self.Xd if form == "lora" else self.X, std=0.02)

    def forward(self) -> Tensor:
        return self.Xd @ self.Xu if hasattr(self, "Xd") else self.X


@register(GloraConfig)
class GLoRA(WithBiases, WeightMethod):
    """W' = W + W * A + B, b' = b + b * D + E + W C, * entry by entry

    One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, Chavan et al. 2023, arXiv:2306.07967. The form of
    each is chosen by hand here, not by the paper's search. C, D and E are there at layers that have a bias, as in peft.
    It costs a second product of the layer's size. Use it where scales and biases should train beside low ranks.
    Parameters per site: 2 r (O + I) + r (I + 1) + 2, as it is left out of the configuration.
    """

    widens = False
    reads_bias = True

    def __init__(self, config: GloraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        outputs, features, has_bias = layer.shape[0], math.prod(layer.shape[1:]), layer.bias is not None
        forms = dict.fromkeys("AB", config.config_A_B)
        forms |= {"C": config.config_C, **dict.fromkeys("DE", config.config_D_E)}
        forms |= {} if has_bias else dict.fromkeys("CDE", "none")
        shapes = {**dict.fromkeys("AB", (outputs, features)), "C": (features, 1), **dict.fromkeys("DE", (outputs,))}
        self.absent: Mapping[str, tuple[int, ...]] = {n: shapes[n] for n, form in forms.items() if form == "none"}
        if len(self.absent) == len(forms):
            raise ValueError(
                f"GLoRA: nothing trains at {layer.path!r}, which has {'a' if has_bias else 'no'} bias: config_A_B, "
                'config_C and config_D_E are "none" as far as they count. Give one of them a form.'
            )
        for name in [n for n in forms if n not in self.absent]:  # in one order in all processes
            self.add_module(name, Support(forms[name], shapes[name], config.r, config.init_weights))

    def part(self, name: str) -> Tensor | None:
        return None if name in self.absent else self.get_submodule(name)()

    def change(self, weight: Tensor) -> Tensor | None:
        """What is added to a weight; A and B are of one form."""
        a, b = self.part("A"), self.part("B")
        return None if a is None or b is None else (weight.flatten(1) * a + b).view(weight.shape)

    def merge(self, weight: Tensor) -> Tensor:
        change = self.change(weight)
        return weight if change is None else weight + change

    def new_bias(self, below: Layer) -> Tensor | None:
        if (bias := below.bias) is None:
            return None
        c, d, e = (self.part(name) for name in "CDE")
        moved = bias if c is None else bias + (below.weight().flatten(1).to(c.dtype) @ c)[:, 0]
        return moved if d is None or e is None else moved + bias * d + e

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y, bias, moved = base(x), base.bias, self.new_bias(base)
        if (change := self.change(base.weight())) is not None:  # apart: W' in half precision loses it
            y = y + base.apply(x, change).to(y.dtype)
        return y if bias is None or moved is None else y + base.along_channels((moved - bias).to(y.dtype), y)
