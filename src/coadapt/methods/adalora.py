from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import WeightConfig
from ..core import target
from ..core.importance import Importance, best
from ..core.layer import Layer
from ..core.lowrank import LowRankMethod, is_plain
from ..core.method import Driven, Place, register
from .lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(WeightConfig):
    """A LoRA as B diag(E) A that begins with the same rank everywhere and keeps the ranks that matter most."""

    kind = "ADALORA"
    foreign: ClassVar[Mapping[str, Any]] = {**LoraConfig.foreign, "bias": "none", "qalora_group_size": 16}

    total_step: int
    """The steps of the whole training; `coadapt train` fills it in."""
    init_r: int = 12
    """The rank that each layer begins with."""
    target_r: int = 8
    """The rank that is left in the end, on average over the layers."""
    tinit: int = 0
    """Steps at the start in which no rank is taken away."""
    tfinal: int = 0
    """Steps at the end in which the ranks that are left stay the same."""
    deltaT: int = 1
    """Steps between two allocations."""
    beta1: float = 0.85
    """How long a sensitivity is remembered: the factor of its running mean."""
    beta2: float = 0.85
    """The same for the mean of its deviations."""
    orth_reg_weight: float = 0.5
    """Weight of the term that keeps the rows of A and the columns of B orthonormal."""
    lora_alpha: int | float = 8
    """Scale of the change: it is multiplied by alpha / init_r."""
    lora_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""
    init_lora_weights: bool = True
    """True: E zero, so that nothing changes at the start; False: A, B and E normal."""
    rank_pattern: Mapping[str, Sequence[bool]] | None = None
    """What peft's files say once ranks have fallen: the path of each layer's E -> which of its ranks are left."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("total_step", "init_r", "target_r", "deltaT")
        self.probability("beta1", "beta2", "lora_dropout")
        if self.target_r > self.init_r:
            raise ValueError(f"AdaLoraConfig: target_r={self.target_r} is above init_r={self.init_r}: ranks only fall.")
        if min(self.tinit, self.tfinal) < 0 or self.tinit >= self.total_step - self.tfinal or self.orth_reg_weight < 0:
            raise ValueError(
                f"AdaLoraConfig: tinit={self.tinit}, tfinal={self.tfinal} and orth_reg_weight={self.orth_reg_weight} "
                f"must not be below 0, and tinit + tfinal must be less than total_step={self.total_step}: ranks fall "
                "in between."
            )

    def budget(self, step: int, first: int, last: int) -> int:
        """(12): how many ranks are left after `step` steps, of all layers together."""
        end = self.total_step - self.tfinal
        left = 1 - (min(max(step, self.tinit), end) - self.tinit) / (end - self.tinit)
        return int(last + (first - last) * left**3)


@register(AdaLoraConfig)
class AdaLoRA(Driven, LowRankMethod):
    """W' = W + (alpha / init_r) B diag(E) A, E with fewer and fewer entries

    Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, Zhang et al. 2023, arXiv:2303.10512. It drives
    itself: nothing has to be called after a step. Sensitivities are taken before the step, as in Algorithm 1, where
    weight and gradient belong together (peft: after it); exactly as many ranks as the budget says are left, also where
    scores are equal (peft: fewer). The term of orthogonality is that of the authors' program and of peft, the mean of
    |A A^T - 1| and |B^T B - 1| (in the paper: the sum of squares); its gradient is added at the step, so that it is
    there in any loop, once, unclipped, and not in the loss that is shown. Files keep ranks that were taken away, as
    zeros in E. Use it where a LoRA's rank should go where it is needed. Parameters per site: r (O + I K + 1).
    """

    kinds = ("linear", "embedding", "conv")

    def __init__(self, config: AdaLoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        out_features, *in_dims = layer.shape
        pattern = config.rank_pattern or {}
        left = next((kept for key, kept in pattern.items() if key.removesuffix(".lora_E") == layer.path), None)
        r = config.init_r if left is None else sum(left)
        self.config, self.scale, self.dropout = config, config.lora_alpha / (config.init_r + 1e-5), config.lora_dropout
        self.widens = not is_plain(layer.module)
        spread = 0.02 if config.init_lora_weights else 1.0
        self.A = nn.Parameter(spread * torch.randn(r, *in_dims))  # (R, I, *K)
        self.B = nn.Parameter(spread * torch.randn(out_features, r))  # (O, R)
        self.E = nn.Parameter(torch.zeros(r, 1) if config.init_lora_weights else torch.randn(r, 1))  # (R, 1)
        self.importance: Importance | None = self._importance()

    @classmethod
    def places(cls, config: AdaLoraConfig, base: nn.Module) -> list[Place]:
        found = super().places(config, base)
        target.check_transposed(config, [place.module for place in found])
        known = {f"{place.path}.lora_E" for place in found}
        if config.rank_pattern is not None and (strange := config.rank_pattern.keys() ^ known):
            raise ValueError(f"AdaLoraConfig: rank_pattern must name each target's E once; {sorted(strange)} differ.")
        return found

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A * self.E.view(-1, *[1] * (self.A.dim() - 1)), self.B, self.scale

    def _importance(self) -> Importance:
        made = Importance(dict(self.named_parameters(recurse=False)))
        made.register_buffer("kept", torch.ones_like(self.E, dtype=torch.bool))  # (R, 1), once ranks fall no more
        return made

    @classmethod
    def before_step(cls, methods: Sequence["AdaLoRA"], step: int) -> None:
        c = methods[0].config
        for method in methods:
            if method.E.grad is None:  # no call has used it
                continue
            for parameter in (method.A, method.B):
                assert parameter.grad is not None
                rows = parameter.flatten(1) if parameter is method.A else parameter.mT  # (R, ...)
                excess = rows @ rows.mT - torch.eye(len(rows)).to(rows)
                pull = (excess @ rows) * (c.orth_reg_weight / len(methods) / excess.norm().clamp(min=1e-12))
                parameter.grad += pull.view_as(parameter) if parameter is method.A else pull.mT
        for method in methods if step <= c.total_step - c.tfinal else ():
            method.importance = method.importance or method._importance()
            method.importance.note(dict(method.named_parameters(recurse=False)), c.beta1, c.beta2)

    @classmethod
    def after_step(cls, methods: Sequence["AdaLoRA"], step: int) -> None:
        c = methods[0].config
        end = c.total_step - c.tfinal
        found = [method.importance or method._importance() for method in methods]
        if c.tinit < step <= end and (step % c.deltaT == 0 or step == end):
            scores = [i.of("E")[:, 0] + i.of("A").flatten(1).mean(1) + i.of("B").mean(0) for i in found]  # (7)
            first = sum(map(len, scores))
            left = best(scores, c.budget(step, first, min(first, c.target_r * len(methods))))
            for method, importance, kept in zip(methods, found, left, strict=True):
                method.E.masked_fill_(~kept[:, None], 0)
                importance.get_buffer("kept").copy_(kept[:, None])
        elif step > end:
            for method, importance in zip(methods, found, strict=True):
                method.E.masked_fill_(~importance.get_buffer("kept"), 0)
