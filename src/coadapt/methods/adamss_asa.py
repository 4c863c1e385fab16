import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.importance import Importance, best
from ..core.layer import Layer
from ..core.method import Driven, Place, register
from .adamss import AdaMSS, AdamssConfig


@register(AdamssConfig, variant="ASA")
class AdaMSSASA(Driven, AdaMSS):
    """[W', b'] = [W, b] + B A V as in AdaMSS, its groups frozen one after another

    AdaMSS's adaptive subspace allocation. It drives itself, where peft needs a callback; `requires_grad` stays as it
    is. Exactly as many groups as the schedule says are left (peft: one less), the last at `final_warmup` whatever
    `mask_interval` is. What is frozen stays so, as in peft. Use it as AdaMSS, where fewer parameters still should
    train. Parameters per site: (num_subspaces r + O) subspace_rank.
    """

    def __init__(self, config: AdamssConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.importance: Importance | None = self._importance()
        self._held: tuple[Tensor, Tensor] | None = None

    @classmethod
    def places(cls, config: AdamssConfig, base: nn.Module) -> list[Place]:
        found = super().places(config, base)
        every = sum(min(config.num_subspaces, p.layer.shape[0]) for p in found)
        if config.use_asa and config.asa_target_subspaces >= every:
            raise ValueError(
                f"AdamssConfig: use_asa has no effect: asa_target_subspaces={config.asa_target_subspaces} is not below "
                f"the {every} groups of {len(found)} targets."
            )
        return found

    def _importance(self) -> Importance:
        made = Importance({"A": self.A, "B": self.B})
        made.register_buffer("trains", torch.ones(len(self.A), dtype=torch.bool, device=self.A.device))  # (K,)
        return made

    def scores(self) -> Tensor:
        """(K,) the mean importance of each group's A plus that of its B; of those that are frozen below all others."""
        assert self.importance is not None
        group, used = self.base.get_buffer("group"), self.base.get_buffer("used")
        ranks, b = used.sum(1), self.importance.of("B").sum(1)
        sizes = group.bincount(minlength=len(ranks))
        of_a = self.importance.of("A").sum((1, 2)) / (ranks * self.A.shape[2])
        of_b = b.new_zeros(len(ranks)).index_add(0, group, b) / (ranks * sizes).clamp(min=1)
        return (of_a + of_b).masked_fill(~self.importance.get_buffer("trains"), -math.inf)

    @classmethod
    def before_step(cls, methods: Sequence["AdaMSSASA"], step: int) -> None:
        c = methods[0].config
        for method in methods:
            importance = method.importance = method.importance or method._importance()
            if c.init_warmup <= step <= c.final_warmup:
                importance.note({"A": method.A, "B": method.B}, c.asa_importance_beta, c.asa_uncertainty_beta)
            still = not bool(importance.get_buffer("trains").all())
            method._held = (method.A.clone(), method.B.clone()) if still else None

    @classmethod
    def after_step(cls, methods: Sequence["AdaMSSASA"], step: int) -> None:
        c = methods[0].config
        for method in methods:
            if method._held is not None and method.importance is not None:
                trains = method.importance.get_buffer("trains")
                for parameter, held, kept in zip(
                    (method.A, method.B), method._held, (trains, trains[method.base.get_buffer("group")]), strict=True
                ):
                    parameter[~kept] = held[~kept]
                method._held = None
        if c.init_warmup <= step <= c.final_warmup and (step % c.mask_interval == 0 or step == c.final_warmup):
            scores = [method.scores() for method in methods]
            for method, left in zip(methods, best(scores, c.budget(step, sum(map(len, scores)))), strict=True):
                assert method.importance is not None
                method.importance.forget()
                method.importance.get_buffer("trains").logical_and_(left)
