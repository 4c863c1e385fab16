from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.layer import Layer
from ..core.method import Driven, register
from ..core.orthonormal import pull
from ..inits import Begun, Site
from .lora import LoRA, LoraConfig


@register(LoraConfig, variant="KASA")
class KaSA(LoRA, Driven):
    """W' = W - N + (alpha / r) B diag(d) A, with N the r smallest singular values of W

    KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, Wang et al. 2024, arXiv:2412.06071.
    Different from peft: the base stays as it is (N = (alpha / r) B0 A0 is subtracted here), so other adapters see the
    whole base; and the paper's regularisers, beta |d|^2 + gamma (|BᵀB - 1| + |A Aᵀ - 1|), are not left to the user:
    their gradients are added before each step, after clipping. Files hold A, B and d; N is worked out again when they
    are loaded. Use it where the weight's smallest directions are noise. Parameters per site: r (O + I K) + r.
    """

    kinds = LoRA.kinds[:3]
    keeps_taken = False

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.d = nn.Parameter(torch.randn(self.B.shape[-1]))  # (R,)
        options: Any = config.kasa_config
        self.beta, self.gamma = options.beta, options.gamma

    def begun(self, config: LoraConfig, layer: Layer, r: int) -> Begun:
        begun = super().begun(config, layer, r)
        at = Site(layer, r, self.scale)
        if r >= min(at.shape):
            raise ValueError(f"KaSA drops r={r} singular values of {layer.path!r}, which has only {min(at.shape)}.")
        if layer.blank:
            return replace(begun, taken=(torch.zeros_like(begun.pair[0]), torch.zeros_like(begun.pair[1])))
        u, s, vh = torch.linalg.svd(at.weight(), full_matrices=False)
        return replace(begun, taken=(vh[-r:].clone(), u[:, -r:] * (s[-r:] / self.scale)))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        assert self.A0 is not None and self.B0 is not None
        return torch.cat([self.A, self.A0]), torch.cat([self.B * self.d, -self.B0], 1), self.scale

    @classmethod
    def before_step(cls, methods: Sequence["KaSA"], step: int) -> None:
        for m in methods:
            if m.A.grad is None or m.B.grad is None or m.d.grad is None:
                continue
            m.A.grad += 2 * m.gamma * pull(m.A.flatten(1)).view_as(m.A)
            m.B.grad += 2 * m.gamma * pull(m.B.mT).mT
            m.d.grad += 2 * m.beta * m.d
