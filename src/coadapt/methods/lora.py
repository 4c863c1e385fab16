from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import tying
from ..core.adapter import Adapter
from ..core.layer import Layer, kind_of
from ..core.lowrank import LowRankMethod
from ..core.method import Companion, Method, Place, register
from ..inits import Begun, begin, named, rank_and_scale
from .bitfit import WithBiases
from .lora_bias import LoraBias
from .lora_config import LoraConfig
from .trainable_tokens import WithTokens, beside_tokens


class OfLoraConfig(WithTokens, WithBiases):
    """Mixed into LoRA and its variants: where what a LoraConfig describes sits, and what comes along."""

    @classmethod
    def places(cls, config: LoraConfig, base: nn.Module) -> list[Place]:
        inherited: Any = super()
        tokens = [place for beside in beside_tokens(config, base) for place in beside.places]
        places = tying.with_places(config, base, inherited.places(config, base), tokens)
        if config.ensure_weight_tying and config.method != "LORA" and tying.tied(base, [p.path for p in places]):
            raise ValueError(
                f"LoraConfig: ensure_weight_tying makes plain LoRAs one; {config.method} cannot be at tied layers so. "
                "Put those into another adapter."
            )
        return places

    @classmethod
    def companions(cls, config: LoraConfig, base: nn.Module, places: list[Place]) -> list[Companion]:
        own = [Companion(LoraBias, config, places)] if config.lora_bias else []
        return [*super().companions(config, base, places), *own]


@register(LoraConfig)
class LoRA(OfLoraConfig, LowRankMethod):
    """W' = W + (alpha / r) B A, or W + (alpha / r) (B A - B0 A0)

    LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv:2106.09685. On an embedding A starts at
    zero and B random. Starts that take B A from the base (PiSSA and its kin) leave the base as it is, unlike the
    field: what they took, B0 A0, is frozen here and subtracted, and files hold one plain LoRA of twice the rank. Use it
    first: it merges, and every program loads it. Parameters per site: r (O + I K).
    """

    kinds = ("linear", "embedding", "conv", "experts")
    keeps_taken: ClassVar[bool] = True
    """Whether files hold A0 and B0, as further ranks; otherwise they are worked out again."""
    waits: str = ""
    """The call that has to come before it trains, where it lacks data."""
    ties: str = ""
    """Its path, where it is to be one with those at layers of the same weight."""
    tied: bool = False
    """Whether its parameters are those of another layer, with the same weight."""
    turned: bool = False
    """Whether that layer has the weight transposed, as an embedding has a head's."""
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        experts = layer.shape[:1] if layer.kind.name == "experts" else ()
        kernel = layer.shape[len(experts) + 2 :]
        r, self.scale = rank_and_scale(config, layer.path)
        if config.lora_dropout:
            self.dropout = config.lora_dropout
        begun = self.begun(config, layer, r)
        a, b = begun.pair
        self.A = nn.Parameter(a.unflatten(-1, (-1, *kernel)))  # (R, I, *K); of experts (E, R, I)
        if named(config.init_lora_weights)[0].freezes_b:
            self.register_buffer("B", b)
        else:
            self.B = nn.Parameter(b)  # (O, R); of experts (E, O, R)
        a0, b0 = begun.taken or (None, None)
        self.register_buffer("A0", None if a0 is None else a0.unflatten(-1, (-1, *kernel)))  # as A and B, frozen
        self.register_buffer("B0", b0)
        if begun.waits:  # modules are slow to take an attribute, and a model has hundreds of sites
            self.waits = begun.waits
        if tying.same(config):
            self.ties = layer.path

    def share(self, earlier: Method) -> None:
        if not self.ties or not isinstance(earlier, LoRA):
            return
        if (len(earlier.B.mT), earlier.scale) != (len(self.B.mT), self.scale):
            raise ValueError(
                f"LoraConfig: ensure_weight_tying makes one change of {earlier.ties!r} and {self.ties!r}, which "
                "rank_pattern or alpha_pattern give another rank or scale."
            )
        self.tied, self.turned = True, earlier.kind != self.kind
        self.A, self.B, self.A0, self.B0 = earlier.A, earlier.B, earlier.A0, earlier.B0

    def begun(self, config: LoraConfig, layer: Layer, r: int) -> Begun:
        """What A and B start with, and what has to be subtracted."""
        settings = getattr(config, f"{config.init_lora_weights}_config", None)
        return begin(config.init_lora_weights, layer, r, self.scale, settings)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.waits:
            self.waits = ""

    def factors(self) -> tuple[Tensor, Tensor, float]:
        if self.waits and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"This LoRA is to start from data, which nobody has looked at yet: call {self.waits} before it trains."
            )
        a, b = self.A, self.B
        # Not `self.A0 is not None`: a module is slow to find a buffer, and each call of each site asks.
        if self._buffers["A0"] is not None and self.A0 is not None and self.B0 is not None:
            a, b = torch.cat([a, self.A0], b.dim() - 2), torch.cat([b, -self.B0], -1)
        return (b.mT, a.mT, self.scale) if self.turned else (a, b, self.scale)


def loras(adapter: nn.Module) -> Iterator[tuple[bool, LoRA]]:
    """Whose B trains in an adapter, DoRA's among them; and whether each is at an embedding."""
    for part in adapter.parts if isinstance(adapter, Adapter) else ():
        kind = kind_of(part.place.module)
        for method in part.method.modules():
            if isinstance(method, LoRA) and method.B.requires_grad and not method.tied:
                yield kind is not None and kind.name == "embedding" and not part.place.parameter, method
