from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import BiasConfig, RankedConfig, TokensConfig, TransposedConfig
from ..core.adapter import Adapter
from ..core.layer import Layer, kind_of
from ..core.lowrank import LowRankMethod, is_plain
from ..core.method import Companion, Place, register
from ..inits import STARTS, Begun, begin, known, named, rank_and_scale
from ..lora_options import (
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    Options,
    VeloraConfig,
)
from .bitfit import WithBiases
from .lora_bias import LoraBias
from .trainable_tokens import WithTokens

_OPTIONS: Mapping[str, type[Options]] = {
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "loftq_config": LoftQConfig,
    "velora_config": VeloraConfig,
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig(BiasConfig, RankedConfig, TokensConfig, TransposedConfig):
    """W' = W + (alpha / r) B A at the layers that are targeted."""

    kind = "LORA"
    foreign: ClassVar[Mapping[str, Any]] = {"megatron_core": "megatron.core"}
    unread: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("megatron_config", "megatron_core"), "Megatron's parallel layers are not adapted"),
        "runtime_config": "nothing is moved to a GPU for a while; load the base with a device_map",
        "arrow_config": "Arrow is a composition here: 'arrow(one, two)', or Arrow(...)",
    }

    r: int = 8
    """Rank of the change."""
    lora_alpha: int | float = 8
    """Scale of the change: it is multiplied by alpha / r, or by alpha / sqrt(r) with `use_rslora`."""
    lora_dropout: float = 0.0
    """Share of the inputs to A that are dropped while training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    init_lora_weights: bool | str = True
    """True: A random, B zero, so that nothing changes at the start; "gaussian": A normal; False: both random;
    "orthogonal": both random, with a product of zero. From the weight: "pissa" or, faster, "pissa_niter_4"
    (arXiv:2404.02948), "olora" (arXiv:2406.01775), "mica" (arXiv:2604.01694: B stays frozen). From data, with a call of
    its own: "eva" (arXiv:2410.07170, `initialize_lora_eva_weights`), "corda" (arXiv:2406.05223, `preprocess_corda`),
    "lora_ga" (arXiv:2407.05000, `preprocess_loraga`)."""
    eva_config: EvaConfig | Mapping[str, Any] | None = None
    """Options of "eva"."""
    corda_config: CordaConfig | Mapping[str, Any] | None = None
    """Options of "corda"."""
    loftq_config: LoftQConfig | Mapping[str, Any] | None = field(default_factory=dict)
    """Options of "loftq": train for a weight that is quantised, in the adapter (arXiv:2310.08659)."""
    lora_ga_config: LoraGAConfig | Mapping[str, Any] | None = None
    """Options of "lora_ga"."""
    use_dora: bool = False
    """Train each row's length apart from its direction: DoRA (arXiv:2402.09353)."""

    lora_bias: bool = False
    """Train a bias of B, scaled as its change is."""
    alora_invocation_tokens: Sequence[int] | None = None
    """Active only from the last occurrence of these tokens on: activated LoRA (arXiv:2504.12397)."""
    use_bdlora: BdLoraConfig | Mapping[str, Any] | None = None
    """Which factors are block-diagonal: BD-LoRA (arXiv:2510.23346)."""
    use_qalora: bool = False
    """A change that is constant along groups of inputs: QA-LoRA (arXiv:2309.14717)."""
    qalora_group_size: int = 16
    """How many inputs make a group then."""
    kasa_config: KasaConfig | Mapping[str, Any] | None = None
    """Trained singular values in place of the weight's smallest ones: KaSA (arXiv:2412.06071)."""
    velora_config: VeloraConfig | Mapping[str, Any] | None = None
    """Activations kept coarsely for the backward: VeLoRA (arXiv:2405.17991)."""

    @property
    def method(self) -> str:
        return next(iter(self._variants()), "LORA")

    def _variants(self) -> list[str]:
        asked = {
            "DORA": self.use_dora,
            "LOFTQ": self.init_lora_weights == "loftq",
            "ALORA": self.alora_invocation_tokens is not None,
            "BD_LORA": self.use_bdlora is not None,
            "QA_LORA": self.use_qalora,
            "KASA": self.kasa_config is not None,
            "VELORA": self.velora_config is not None,
        }
        return [name for name, wanted in asked.items() if wanted]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("lora_dropout")
        self.positive("qalora_group_size")
        for name, options in _OPTIONS.items():
            given = getattr(self, name)
            if name == "loftq_config" and not given:  # by default it is empty, as in the field
                given = {} if self.init_lora_weights == "loftq" else None
                object.__setattr__(self, name, {})
            if given is not None:
                object.__setattr__(self, name, options.of(given))
        self._check_variants()
        if not known(self.init_lora_weights):
            self.choice("init_lora_weights", tuple(STARTS))
            raise ValueError("LoraConfig: init_lora_weights='pissa_niter_[n]' needs a number: 'pissa_niter_4'.")

    def _check_variants(self) -> None:
        variants = self._variants()
        if len(variants) > 1:
            raise ValueError(f"LoraConfig: {' and '.join(variants)} cannot be one adapter; put them into two.")
        if self.lora_bias and variants[:1] in (["DORA"], ["ALORA"]):
            raise ValueError(f"LoraConfig: lora_bias and {variants[0]} cannot be one adapter; put them into two.")
        tokens = self.alora_invocation_tokens
        if tokens is not None and (not tokens or any(not isinstance(t, int) or t < 0 for t in tokens)):
            raise ValueError(f"LoraConfig: alora_invocation_tokens={tokens!r} must be token ids, at least one.")
        if tokens is not None and (self.bias != "none" or self.trainable_token_indices):
            raise ValueError(
                "LoraConfig: biases and tokens that are trained along would act before the invocation too; put them "
                "into an adapter of their own."
            )
        for start in ("eva", "corda", "lora_ga", "loftq"):
            if isinstance(getattr(self, f"{start}_config"), Options) and self.init_lora_weights != start:
                raise ValueError(f"LoraConfig: {start}_config has no effect without init_lora_weights={start!r}.")
        if self.qalora_group_size != 16 and not self.use_qalora:
            raise ValueError("LoraConfig: qalora_group_size has no effect without use_qalora=True.")
        plain = self.init_lora_weights in (True, False, "gaussian")
        if not plain and (variants not in ([], ["DORA"], ["ALORA"], ["LOFTQ"], ["VELORA"]) or self.lora_bias):
            raise ValueError(
                f"LoraConfig: init_lora_weights={self.init_lora_weights!r} starts plain LoRAs and DoRA; "
                f"{variants[0] if variants else 'lora_bias'} has a start of its own. Leave it out."
            )


@register(LoraConfig)
class LoRA(WithTokens, WithBiases, LowRankMethod):
    """W' = W + (alpha / r) B A, or W + (alpha / r) (B A - B0 A0)

    LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021, arXiv:2106.09685. On an embedding A starts at
    zero and B random. Starts that take B A from the base (PiSSA and its kin) leave the base as it is, unlike the
    field: what they took, B0 A0, is frozen here and subtracted, and files hold one plain LoRA of twice the rank. Use it
    first: it merges, and every program loads it. Parameters per site: r (O + I K).
    """

    kinds = ("linear", "embedding", "conv", "experts")
    keeps_taken: ClassVar[bool] = True
    """Whether files hold A0 and B0, as further ranks; otherwise they are worked out again."""
    B: Tensor
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        experts = layer.shape[:1] if layer.kind.name == "experts" else ()
        kernel = layer.shape[len(experts) + 2 :]
        r, self.scale = rank_and_scale(config, layer.path)
        self.dropout = config.lora_dropout
        self.widens = not is_plain(layer.module)
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
        self.waits = begun.waits

    def begun(self, config: LoraConfig, layer: Layer, r: int) -> Begun:
        """What A and B start with, and what has to be subtracted."""
        settings = getattr(config, f"{config.init_lora_weights}_config", None)
        return begin(config.init_lora_weights, layer, r, self.scale, settings)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.waits = ""

    @classmethod
    def companions(cls, config: LoraConfig, base: nn.Module, places: list[Place]) -> list[Companion]:
        own = [Companion(LoraBias, config, places)] if config.lora_bias else []
        return [*super().companions(config, base, places), *own]

    def factors(self) -> tuple[Tensor, Tensor, float]:
        if self.waits and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"This LoRA is to start from data, which nobody has looked at yet: call {self.waits} before it trains."
            )
        if self.A0 is None or self.B0 is None:
            return self.A, self.B, self.scale
        return torch.cat([self.A, self.A0], self.B.dim() - 2), torch.cat([self.B, -self.B0], -1), self.scale


def loras(adapter: nn.Module) -> Iterator[tuple[bool, LoRA]]:
    """Whose B trains in an adapter, DoRA's among them; and whether each is at an embedding."""
    for part in adapter.parts if isinstance(adapter, Adapter) else ():
        kind = kind_of(part.place.module)
        for method in part.method.modules():
            if isinstance(method, LoRA) and method.B.requires_grad:
                yield kind is not None and kind.name == "embedding" and not part.place.parameter, method
