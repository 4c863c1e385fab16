import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

from ..config import WeightConfig
from ..core.backbone import stack_facts, stacks
from ..core.gates import per_row, tasks_told
from ..core.layer import Layer
from ..core.method import WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class PolyConfig(WeightConfig):
    """Small LoRAs, the skills, of which each task has a mix of its own at each layer."""

    kind = "POLY"

    r: int = 8
    """R of each skill."""
    n_tasks: int = 1
    """How many tasks there are; the call's `task_ids` say which one each row is of, counted from 0."""
    n_skills: int = 4
    """How many skills each layer has."""
    n_splits: int = 1
    """Into how many parts inputs and outputs are cut, each with a mix of its own (Multi-Head Routing)."""
    poly_type: str = "poly"
    """Only "poly": a table with a row for each task."""
    init_weights: bool = True
    """True: B starts at zero, so that nothing changes; False: random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "n_tasks", "n_skills", "n_splits")
        self.choice("poly_type", ("poly",))


@register(PolyConfig)
class Poly(WeightMethod):
    """W' = W + (A_t B_t)^T / r with A_t = sum_s w_ts A_s, B_t = sum_s w_ts B_s, w_t = sigmoid(Z_t) / sum

    Combining Parameter-efficient Modules for Task-level Generalisation, Ponti et al. 2022, arXiv:2202.13914; in parts:
    Multi-Head Adapter Routing, Caccia et al. 2022, arXiv:2211.03831. While it trains the sigmoid is a draw from a
    relaxed Bernoulli of temperature 1, for each row. Different from the field: with one task, `task_ids` may be left
    out, a draw is for the whole batch, and it can be merged; GPT-2's layers are adapted too. Use it for many tasks that
    share skills, and for new ones with few examples. Parameters per site: S r (I + O) + tasks S splits.
    """

    kinds = ("linear",)

    def __init__(self, config: PolyConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        (out, inner), parts = layer.shape, config.n_splits
        if out % parts or inner % parts:
            raise ValueError(
                f"PolyConfig: n_splits={parts} does not divide the {inner} inputs and {out} outputs of {layer.path!r}. "
                f"Pick a divisor of {math.gcd(inner, out)}."
            )
        self.tasks, self.scale = config.n_tasks, 1 / config.r
        self.needs_call = "it has another weight for each task" if self.tasks > 1 else ""
        self.A = nn.Parameter(torch.empty(parts, config.n_skills, inner // parts, config.r))  # (P, S, I / P, R)
        self.B = nn.Parameter(torch.zeros(parts, config.n_skills, config.r, out // parts))  # (P, S, R, O / P)
        self.Z = nn.Parameter(torch.empty(config.n_tasks, parts * config.n_skills))  # (tasks, P S)
        nn.init.uniform_(self.A, -1, 1).data.mul_((parts / inner) ** 0.5)
        nn.init.uniform_(self.Z, -1e-3, 1e-3)
        if not config.init_weights:
            nn.init.uniform_(self.B, -1, 1).data.mul_(config.r**-0.5)

    @classmethod
    def facts(cls, config: PolyConfig, base: Any) -> dict[str, Any]:
        """Without a task type peft hands on no tasks."""
        return {"task_type": stack_facts(base)["task_type"]} if stacks(base) else {}

    def mixed(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """The factors for tasks (B,): (B, I, R) and (B, R, O)."""
        logits = self.Z[tasks].view(len(tasks), *self.A.shape[:2])  # (B, P, S)
        drawn = RelaxedBernoulli(torch.ones(()).to(logits), logits=logits).rsample() if self.training else None
        weights = logits.sigmoid() if drawn is None else drawn
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        down = torch.einsum("bps,psir->bpir", weights, self.A).flatten(1, 2)
        return down, torch.einsum("bps,psro->brpo", weights, self.B).flatten(2)

    def merge(self, weight: Tensor) -> Tensor:
        if self.tasks > 1:
            raise ValueError(f"Poly has a weight for each of {self.tasks} tasks, so there is no one weight to read.")
        (down,), (up,) = self.mixed(torch.zeros(1, dtype=torch.long, device=weight.device))
        return weight + self.scale * (down @ up).mT

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y, told = base(x), tasks_told(self.tasks).to(x.device)
        if self.tasks == 1:
            (down,), (up,) = self.mixed(told[:1])
            return y + self.scale * (x @ down @ up)
        down, up = self.mixed(per_row(told, len(x)))
        return y + self.scale * (x.flatten(1, -2) @ down @ up).view(y.shape)
