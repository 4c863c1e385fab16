import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import WeightConfig
from ..core.clusters import groups
from ..core.decompositions import singular_vectors
from ..core.layer import Layer
from ..core.method import AdditiveMethod, FromBase, register


@dataclass(frozen=True, kw_only=True)
class AdamssConfig(WeightConfig):
    """The outputs of a layer in groups, each with a small change within the layer's largest singular vectors."""

    kind = "ADAMSS"

    r: int = 100
    """How many singular vectors there are to work with."""
    num_subspaces: int = 5
    """Into how many groups outputs are put."""
    subspace_rank: int = 1
    """Rank of each group's change."""
    init_weights: str | bool | None = "orthogonal"
    """"orthogonal": B zero, so that nothing changes at the start; None (or False): B normal with spread 0.01."""
    use_asa: bool = False
    """Freeze the groups that matter least while it trains, until `asa_target_subspaces` are left."""
    asa_target_subspaces: int = 50
    """How many groups train in the end, of all layers together."""
    init_warmup: int = 50
    """The step at which groups begin to be frozen."""
    final_warmup: int = 1000
    """The step at which the last are."""
    mask_interval: int = 100
    """Steps between two choices."""
    asa_importance_beta: float = 0.85
    """How long a sensitivity is remembered: the factor of its running mean."""
    asa_uncertainty_beta: float = 0.85
    """The same for the mean of its deviations."""
    asa_schedule_exponent: float = 3.0
    """How fast the number of groups falls: the exponent of the schedule."""
    use_dynamic_rank: bool = False
    """Give a group a lower rank where its singular values fall below `svd_threshold` of the first, squared."""
    svd_threshold: float = 0.1
    """For `use_dynamic_rank`."""
    random_seed: int = 0
    """Seed of the singular vectors' approximation."""

    @property
    def method(self) -> str:
        return "ASA" if self.use_asa else "ADAMSS"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "mask_interval")
        self.choice("init_weights", ("orthogonal", None, False))
        self.probability("asa_importance_beta", "asa_uncertainty_beta", "svd_threshold")
        if self.use_asa and not (0 <= self.init_warmup < self.final_warmup and self.asa_schedule_exponent > 0):
            raise ValueError(
                f"AdamssConfig: init_warmup={self.init_warmup} must come before final_warmup={self.final_warmup}, and "
                f"asa_schedule_exponent={self.asa_schedule_exponent} be above 0."
            )

    def budget(self, step: int, every: int) -> int:
        """How many of `every` groups train after `step` steps."""
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        last = self.asa_target_subspaces
        return int(last + max(every - last, 0) * left**self.asa_schedule_exponent)


@register(AdamssConfig)
class AdaMSS(AdditiveMethod):
    """[W', b'] = [W, b] + B A V, row o of B A being B[o] A[group of o]

    AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, Zheng et al., NeurIPS 2025. V are the
    largest right singular vectors of [W, b]; outputs are grouped by their left ones, as scikit-learn does it, which is
    not needed. A starts as the group's own first singular vectors, exactly (peft: approximately, up to a sign). Files
    hold V, and groups are found in the base again; with r of the number of outputs or more, rounding decides on them.
    Use it where a LoRA's parameters are too many. Parameters per site: (num_subspaces r + O) subspace_rank.
    """

    def __init__(self, config: AdamssConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.config, self.shape, self.ins = config, layer.shape, math.prod(layer.shape[1:])
        matrix = layer.weight().flatten(1)  # (O, I)
        if layer.bias is not None:
            matrix = torch.cat([matrix, layer.value("bias")[:, None]], 1)  # (O, I + 1)
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        q = min(config.r, *matrix.shape)
        if matrix.is_meta:  # values come later
            u, v = matrix[:, :q], matrix[:q]
        else:
            u, _, v = singular_vectors(matrix, q, config.random_seed)
        self.V: Tensor
        self.register_buffer("V", v.clone())  # (Q, I) or (Q, I + 1)
        group, start, used = _grouped(config, u)
        self.base = FromBase()
        self.base.register_buffer("group", group)  # (O,)
        self.base.register_buffer("used", used)  # (K, R)
        self.A = nn.Parameter(start)  # (K, R, Q)
        B = torch.zeros(len(u), start.shape[1])
        self.B = nn.Parameter(B if config.init_weights else 0.01 * torch.randn(B.shape))  # (O, R)

    def subspaces(self) -> list[tuple[Tensor, int]]:
        """Of each group its outputs and its rank."""
        group, used = self.base.get_buffer("group"), self.base.get_buffer("used")
        return [((group == k).nonzero()[:, 0], int(n)) for k, n in enumerate(used.sum(1))]

    def pieces(self) -> tuple[Tensor, Tensor]:
        """(O, K R) and (K R, I or I + 1), whose product is the change."""
        group, used = self.base.get_buffer("group"), self.base.get_buffer("used")
        own = (self.B * used[group])[:, None]  # (O, 1, R)
        up = own.new_zeros(len(own), *used.shape).scatter(1, group[:, None, None].expand_as(own), own)
        return up.flatten(1), (self.A * used[:, :, None]).flatten(0, 1) @ self.V.to(self.A)

    def change(self) -> Tensor:
        up, down = self.pieces()
        return (up @ down[:, : self.ins]).view(self.shape)

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        up, down = self.pieces()
        return bias if bias is None or down.shape[1] == self.ins else bias + up @ down[:, -1]

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        up, down = self.pieces()
        shift = (up @ down[:, self.ins :]).sum(1)  # (O,)
        if base.kind.name == "linear":
            change = F.linear(F.linear(x, down[:, : self.ins].to(x.dtype)), up.to(x.dtype))
        else:
            change = base.apply(x, (up @ down[:, : self.ins]).view(self.shape))
        return y + (change + base.along_channels(shift.to(change.dtype), change)).to(y.dtype)


def _grouped(config: AdamssConfig, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (O, Q) the group of each row, (O,); the first singular vectors of each group, (K, R, Q), and which it has."""
    count, rank = min(config.num_subspaces, len(u)), min(config.subspace_rank, u.shape[1])
    start, used = torch.zeros(count, rank, u.shape[1]), torch.ones(count, rank, dtype=torch.bool)
    if u.is_meta:
        return torch.zeros(len(u), dtype=torch.long), start, used
    group = groups(u, count)
    for k in range(count):
        _, s, own = torch.linalg.svd(u[group == k], full_matrices=False)
        enough = int((s.square() > config.svd_threshold * s[0].square()).sum()) if config.use_dynamic_rank else rank
        n = max(1, min(enough, rank, len(own)))
        start[k, :n], used[k, n:] = own[:n], False
    return group, start, used
