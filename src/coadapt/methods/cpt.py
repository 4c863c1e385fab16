from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InputConfig
from ..core.backbone import Backbone
from ..core.method import Driven, InputMethod, Place, register


@dataclass(frozen=True, kw_only=True)
class CPTConfig(InputConfig):
    """Examples in front of the input, whose embeddings are trained within a small distance of where they were."""

    kind = "CPT"

    num_virtual_tokens: int = 0
    """A check: how many `cpt_token_ids` there are."""
    cpt_token_ids: Sequence[int]
    """The tokens of the context: examples with their labels, as they would be written in front of the input."""
    cpt_tokens_type_mask: Sequence[int] | None = None
    """For each of them what it is, modulo 4: 1 the format of an input, 2 an input, 3 the format of a label, and 0 a
    label, which is not trained and is learned from; the k-th example counts from 4 k - 3 to 4 k. 0 itself: neither.
    Left out, all are 1."""
    cpt_mask: Sequence[int] | None = None
    """A check: only ones; every token of the context is seen."""
    opt_weighted_loss_type: str = "none"
    """"decay": the farther an example's label is from the input, the less its loss counts."""
    opt_loss_decay_factor: float = 1.0
    """By how much less, from one example to the one before."""
    opt_projection_epsilon: float = 0.1
    """How far the embedding of an input's token may go, at a width of 2048; as its root otherwise."""
    opt_projection_format_epsilon: float = 0.1
    """The same of tokens of the format."""
    tokenizer_name_or_path: str | None = None
    """A note: the tokenizer that the tokens are of."""

    def __post_init__(self) -> None:
        ids = list(self.cpt_token_ids)
        if not ids or self.num_virtual_tokens not in (0, len(ids)):
            raise ValueError(f"CPTConfig: {len(ids)} cpt_token_ids and num_virtual_tokens={self.num_virtual_tokens}.")
        object.__setattr__(self, "num_virtual_tokens", len(ids))
        super().__post_init__()
        self.choice("task_type", (None, "CAUSAL_LM"))
        self.choice("opt_weighted_loss_type", ("none", "decay"))
        for name in ("cpt_tokens_type_mask", "cpt_mask"):
            if (given := getattr(self, name)) is not None and len(given) != len(ids):
                raise ValueError(f"CPTConfig: {len(ids)} cpt_token_ids, and {name} has {len(given)} entries.")
        if self.cpt_mask is not None and not all(self.cpt_mask):
            raise ValueError("CPTConfig: cpt_mask hides tokens of the context; leave those out of cpt_token_ids.")
        self.above_zero("opt_loss_decay_factor", "opt_projection_epsilon", "opt_projection_format_epsilon")
        even = self.opt_weighted_loss_type == "none"
        self.no_effect("opt_loss_decay_factor", even, "without opt_weighted_loss_type='decay'")


@register(CPTConfig)
class CPT(InputMethod, Driven):
    """base([E + d; e]), |d_i| <= eps_i

    Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods, Blau et al. 2024,
    arXiv:2410.17222. E are the embeddings of labelled examples; after each optimiser step d is projected back into the
    ball. With `labels` a call's loss is also over the labels of the examples (in any loop: transformers' Trainer, too).
    Different from the field: the padding of a row stands in front of the context, and not between it and the input;
    labels of the input count whatever the context ends with. Use it with a few labelled examples that fit into the
    context. Parameters per site: N D.
    """

    E: Tensor

    def __init__(self, config: CPTConfig, place: Backbone, base: Any, shared: nn.Module | None = None) -> None:
        super().__init__(config, place, base, shared)
        ids, table = torch.tensor(list(config.cpt_token_ids)), place.embedding.weight
        kinds = torch.tensor(list(config.cpt_tokens_type_mask or [1] * len(ids)))
        if int(ids.max()) >= len(table) or int(ids.min()) < 0:
            least, most = int(ids.min()), int(ids.max())
            raise ValueError(f"CPTConfig: cpt_token_ids lie in {least} ... {most}; the model has {len(table)} tokens.")
        scale = getattr(place.embedding, "embed_scale", 1.0)
        start = torch.zeros(len(ids), place.width) if table.is_meta else table.detach()[ids.to(table.device)] * scale
        self.register_buffer("E", start.float())  # (N, D)
        self.delta = nn.Parameter(torch.zeros(len(ids), place.width))  # d, (N, D)
        label = (kinds > 0) & (kinds % 4 == 0)
        self.trained = kinds % 4 != 0  # (N,)
        radius = torch.where(kinds % 4 == 2, config.opt_projection_epsilon, config.opt_projection_format_epsilon)
        self.radius = radius * (place.width / 2048) ** 0.5  # (N,)
        back = label.long() * (kinds[:, None] < kinds[label].unique()).sum(1)  # (N,) examples between it and the last
        decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        self.labels = ids.where(label, -100), (decay ** (back + 1)).where(label, 1.0)

    @classmethod
    def places(cls, config: Any, base: Any) -> list[Place]:
        found = super().places(config, base)
        if [p.role for p in found] != ["decoder"] or getattr(base.config, "is_encoder_decoder", False):
            raise ValueError(f"CPTConfig: {type(base).__name__} is no causal language model, which the context needs.")
        return found

    def prompt(self) -> Tensor:
        return self.E + self.delta * self.trained[:, None].to(self.delta)

    def start_at(self, tokens: Tensor) -> None:
        """Has the context stand at `tokens`, (N, D)."""
        self.delta.copy_(tokens.to(self.E) - self.E)

    @classmethod
    def after_step(cls, methods: Sequence["CPT"], step: int) -> None:
        for method in methods:
            length = method.delta.norm(dim=1).clamp(min=torch.finfo(method.delta.dtype).tiny)
            method.delta.mul_((method.radius.to(length) / length).clamp(max=1)[:, None])
