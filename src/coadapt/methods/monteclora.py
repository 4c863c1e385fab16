import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

from ..core.layer import Layer
from ..core.lowrank import is_plain
from ..core.method import Driven, register
from .lora import LoRA, LoraConfig


@register(LoraConfig, variant="MONTECLORA")
class MonteCLoRA(LoRA, Driven):
    """W' = W + (alpha / r) B (A + e sum_k p_k E_k), p ~ Dir(exp(c)), E_k ~ N(0, S), S ~ Wishart(diag(exp(2 v)))

    Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation, Seth et al. 2024,
    arXiv:2411.04358. What is drawn around A while training is zero otherwise. Different from peft: numbers come from
    torch's generator, which checkpointing rewinds, and not from a buffer that goes on; the regularisers (divergences
    from the priors, and with `use_entropy` the expected squares of p) are not left to the user: the gradients of their
    expectations, over all sites divided by their number, are added before each step, after clipping; and the divergence
    of Dirichlet distributions has the signs that it has. Use it with few or noisy data. Parameters per site: r (O + I
    K) + r + N.
    """

    kinds = ("linear", "embedding", "conv")
    needs_call = "it draws what it adds in each call"
    by_factors = False

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.options: Any = config.monteclora_config
        self.v = nn.Parameter(torch.empty(self.B.shape[-1]).uniform_())  # (R,) log of the deviations
        self.c = nn.Parameter(torch.empty(self.options.num_samples).uniform_())  # (N,) log of Dirichlet's parameters

    def draws(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is random: of the diagonal of S (R,), of p (N,), of the E_k (N, R, I, *K).

        With as many degrees of freedom as rows the entries of a Wishart matrix's diagonal are independent, chi-squared.
        """
        rank, like = len(self.v), {"dtype": self.v.dtype, "device": self.v.device}
        wishart = torch.randn(rank, rank, **like).square().sum(1)
        return wishart, torch.randn(len(self.c), **like), torch.randn(len(self.c), *self.A.shape, **like)

    def noise(self) -> Tensor:
        """(R, I, *K) that A is drawn apart from its mean."""
        wishart, weights, samples = self.draws()
        n, c = len(self.c), self.c.exp().clamp(min=1e-6)
        spread = (1 / c * (1 - 2 / n) + (1 / c).sum() / n**2).clamp(min=1e-6)  # Dirichlet, as a softmax of normals
        p = torch.softmax(c.log() + spread.sqrt() * weights, 0)
        deviations = ((2 * self.v).exp() * wishart).clamp(min=1e-3).sqrt()
        mixed = (p @ samples.flatten(1)).view(self.A.shape)
        return self.options.sample_scaler * deviations.view(-1, *[1] * (mixed.dim() - 1)) * mixed

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        if not self.training:
            return super().forward(x, base)
        y = base(x)
        x = F.dropout(x, self.drops) if x.is_floating_point() else x
        a, b, scale = self.factors()
        a, dtype = a + self.noise(), x.dtype if x.is_floating_point() else y.dtype
        if not is_plain(base.module):
            return y + base.apply(x, scale * (b @ a.flatten(1)).view(base.shape)).to(y.dtype)
        z = base.kind.apply(base.module, x, a.to(dtype))
        return torch.add(y, base.mix(z, b.to(dtype)).to(y.dtype), alpha=scale)

    def regularisers(self, v: Tensor, c: Tensor) -> Tensor:
        """The expectation of all that is added to the loss, a scalar."""
        rank, n, variances, c = len(v), len(c), (2 * v).exp(), c.exp()
        prior = torch.full_like(c, self.options.dirichlet_prior)
        mixture = kl_divergence(Dirichlet(c, validate_args=False), Dirichlet(prior, validate_args=False))
        wishart = rank / 2 * (variances.sum() - 2 * v.sum() - rank)
        logs = 2 * v + torch.digamma(v.new_tensor(rank / 2)) + math.log(2)  # of the variances that are drawn
        normal = n / 2 * (rank * variances.sum() - logs.sum() - rank)
        squares = (c * (c + 1)).sum() / (c.sum() * (c.sum() + 1)) if self.options.use_entropy else 0.0
        return self.options.kl_loss_weight * (mixture + wishart + normal) + squares

    @classmethod
    def before_step(cls, methods: Sequence["MonteCLoRA"], step: int) -> None:
        for m in methods:
            if m.v.grad is None or m.c.grad is None:
                continue
            with torch.enable_grad():
                v, c = (p.detach().requires_grad_() for p in (m.v, m.c))
                gradients = torch.autograd.grad(m.regularisers(v, c) / len(methods), (v, c))
            m.v.grad += gradients[0]
            m.c.grad += gradients[1]
