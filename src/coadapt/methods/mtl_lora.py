import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.gates import per_row, tasks_told
from ..core.layer import Layer
from ..core.method import WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class MTLLoRAConfig(WeightConfig):
    """A LoRA for several tasks: each transforms what A gives in its own way, and has its own mix of several B."""

    kind = "MTL_LORA"

    r: int = 8
    """R of the factors."""
    lora_alpha: float = 8
    """The change is multiplied by alpha / r."""
    lora_dropout: float = 0.0
    """Share of the inputs that are dropped while training."""
    num_tasks: int = 1
    """How many tasks there are; the call's `task_ids` say which one each row is of, counted from 0."""
    n_up_projection: int = 1
    """How many B there are."""
    task_specific_matrix_type: str = "singular_values"
    """A task's own matrix between A and B: "singular_values" (a diagonal) or "linear" (whole)."""
    weights_sharpness: float = 0.05
    """The temperature of the softmax over the B."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "num_tasks", "n_up_projection")
        self.probability("lora_dropout")
        self.choice("task_specific_matrix_type", ("singular_values", "linear"))
        self.above_zero("weights_sharpness")


@register(MTLLoRAConfig)
class MTLLoRA(WeightMethod):
    """W' = W + (alpha / r) (sum_i softmax(v_t / tau)_i B_i) L_t A for a row of task t

    MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning, Yang et al. 2024, arXiv:2410.09437. L_t starts as the
    identity, B at zero, v even. With one task it can be merged, and `task_ids` may be left out. Use it to train tasks
    together that disturb each other in one LoRA. Parameters per site: r (I + n O) + tasks (r or r r + n).
    """

    kinds = ("linear",)

    def __init__(self, config: MTLLoRAConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        (out, inner), r, tasks = layer.shape, config.r, config.num_tasks
        self.tasks, self.scale, self.dropout = tasks, config.lora_alpha / r, config.lora_dropout
        self.temperature = config.weights_sharpness
        self.needs_call = "it has another weight for each task" if self.tasks > 1 else ""
        self.diagonal = config.task_specific_matrix_type == "singular_values"
        self.A = nn.Parameter(torch.empty(r, inner))  # (R, I)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        start = torch.ones(r) if self.diagonal else torch.eye(r)
        self.L = nn.Parameter(start.repeat(tasks, *[1] * start.dim()))  # (tasks, R) or (tasks, R, R)
        self.B = nn.Parameter(torch.zeros(config.n_up_projection, out, r))  # (n, O, R)
        if config.n_up_projection > 1:
            self.v = nn.Parameter(torch.zeros(tasks, config.n_up_projection))  # (tasks, n)

    def up(self, tasks: Tensor) -> Tensor:
        """(B, O, R): what stands before A for tasks (B,)."""
        if len(self.B) > 1:
            made = torch.einsum("bn,nor->bor", (self.v[tasks] / self.temperature).softmax(-1), self.B)
        else:
            made = self.B.expand(len(tasks), -1, -1)
        return made * self.L[tasks, None] if self.diagonal else made @ self.L[tasks]

    def merge(self, weight: Tensor) -> Tensor:
        if self.tasks > 1:
            raise ValueError(
                f"MTL-LoRA has a weight for each of {self.tasks} tasks, so there is no one weight to read."
            )
        (up,) = self.up(torch.zeros(1, dtype=torch.long, device=weight.device))
        return weight + self.scale * (up @ self.A)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y, told = base(x), tasks_told(self.tasks).to(x.device)
        z = F.linear(F.dropout(x, self.dropout, self.training), self.A)  # (B, ..., R)
        if self.tasks == 1:
            return y + self.scale * F.linear(z, self.up(told[:1])[0])
        return y + self.scale * (z.flatten(1, -2) @ self.up(per_row(told, len(x))).mT).view(y.shape)
