import torch
from torch import Tensor, nn

from ..core.layer import Layer
from ..core.method import WeightMethod, register
from ..core.precision import squares
from .lora import LoRA, LoraConfig, OfLoraConfig


@register(LoraConfig, variant="DORA")
class DoRA(OfLoraConfig, WeightMethod):
    """W' = m (W + s B A) / norm(W + s B A), row by row

    DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al. 2024, arXiv:2402.09353. W is the weight with what stands
    below in a Seq; no gradient goes through the norm (section 4.3). Use it where a LoRA of small rank falls short and
    training may take longer. Parameters per site: r (O + I K) + O.
    """

    widens = False
    kinds = LoRA.kinds[:3]

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.change = LoRA(config, layer).to(layer.weight().device)
        self.m = nn.Parameter(self.norms(layer))  # (O,)

    def merge(self, weight: Tensor) -> Tensor:
        changed = self.change.merge(weight)
        norms = squares(changed.detach()).sqrt()
        return (self.m / norms).view(-1, *[1] * (changed.dim() - 1)) * changed

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = self.change(x, base)
        factors = self.m / self.norms(base)
        out = base.scaled(y, factors)
        bias = base.bias  # is not rescaled
        return out if bias is None else out + base.along_channels(((1 - factors) * bias).to(out.dtype), out)

    @torch.no_grad()
    def norms(self, base: Layer) -> Tensor:
        """(O,) of the rows of W + s B A, which is not made: |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b.

        In fp32 at least but for w A^T, which is multiplied in the dtype of W as the layer's own product is.
        """
        weight, own, (a, b, s) = base.weight().flatten(1), base.squares(), self.change.factors()
        a, b = a.flatten(1).to(own.dtype), b.to(own.dtype)
        crossed = (weight @ a.mT.to(weight.dtype)).to(own.dtype)  # (O, R)
        along = torch.addmm(crossed, b, a @ a.mT, beta=2, alpha=s)
        return torch.add(own, (along * b).sum(1), alpha=s).clamp(min=0).sqrt()
