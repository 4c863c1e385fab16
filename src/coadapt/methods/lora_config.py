from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import BiasConfig, TokensConfig, TransposedConfig, TyingConfig
from ..inits import STARTS, known
from ..lora_options import (
    OPTIONS,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    Options,
    VeloraConfig,
    variants,
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(BiasConfig, TyingConfig, TokensConfig, TransposedConfig):
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

    layer_replication: Sequence[Sequence[int]] | None = None
    """The model's blocks several times, with the same weights and a LoRA of its own each: ranges of them that follow
    each other, [start, end) counted from 0; [[0, 4], [2, 5]] makes 0 1 2 3 2 3 4 of five."""
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
    monteclora_config: MontecloraConfig | Mapping[str, Any] | None = None
    """A drawn around its mean while it trains: MonteCLoRA (arXiv:2411.04358)."""
    velora_config: VeloraConfig | Mapping[str, Any] | None = None
    """Activations kept coarsely for the backward: VeLoRA (arXiv:2405.17991)."""

    @property
    def method(self) -> str:
        return next(iter(variants(vars(self))), "LORA")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r", "qalora_group_size")
        self.probability("lora_dropout")
        if not known(self.init_lora_weights):
            self.choice("init_lora_weights", tuple(STARTS))
            raise ValueError("LoraConfig: init_lora_weights='pissa_niter_[n]' needs a number: 'pissa_niter_4'.")
        self._read_options()
        asked = variants(vars(self))
        if len(asked) > 1:
            raise ValueError(f"LoraConfig: {' and '.join(asked)} cannot be one adapter; put them into two.")
        if self.lora_bias and self.method in ("DORA", "ALORA"):
            raise ValueError(f"LoraConfig: lora_bias and {self.method} cannot be one adapter; put them into two.")
        if self.qalora_group_size != 16 and not self.use_qalora:
            raise ValueError("LoraConfig: qalora_group_size has no effect without use_qalora=True.")
        self._check_replication()
        self._check_invocation()
        self._check_start()

    def _read_options(self) -> None:
        """Options that are given as mappings become what their classes say."""
        if self.loftq_config is None:
            object.__setattr__(self, "loftq_config", {})
        for name, options in OPTIONS.items():
            if name != "loftq_config" or self.loftq_config or self.init_lora_weights == "loftq":  # empty by default
                object.__setattr__(self, name, options.of(getattr(self, name)))

    def _check_replication(self) -> None:
        ranges = self.layer_replication
        if ranges is None:
            return
        numbers = [len(r) == 2 and all(type(i) is int for i in r) and 0 <= r[0] < r[1] for r in ranges]
        if not numbers or not all(numbers):
            raise ValueError(
                f"LoraConfig: layer_replication={ranges!r} must be ranges [start, end) of blocks, such as "
                "[[0, 4], [2, 5]]."
            )
        if self.ensure_weight_tying:
            raise ValueError(
                "LoraConfig: ensure_weight_tying would make the LoRAs of repeated blocks one, which have the same "
                "weights; put tied layers into an adapter without it."
            )

    def _check_invocation(self) -> None:
        if (tokens := self.alora_invocation_tokens) is None:
            return
        if not tokens or any(not isinstance(t, int) or t < 0 for t in tokens):
            raise ValueError(f"LoraConfig: alora_invocation_tokens={tokens!r} must be token ids, at least one.")
        if self.bias != "none" or self.trainable_token_indices:
            raise ValueError(
                "LoraConfig: biases and tokens that are trained along would act before the invocation too; put them "
                "into an adapter of their own."
            )

    def _check_start(self) -> None:
        for start in ("eva", "corda", "lora_ga", "loftq"):
            if isinstance(getattr(self, f"{start}_config"), Options) and self.init_lora_weights != start:
                raise ValueError(f"LoraConfig: {start}_config has no effect without init_lora_weights={start!r}.")
        own = self.lora_bias or self.method not in ("LORA", "DORA", "ALORA", "LOFTQ", "VELORA")
        if own and self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"LoraConfig: init_lora_weights={self.init_lora_weights!r} starts plain LoRAs and DoRA; "
                f"{'lora_bias' if self.method == 'LORA' else self.method} has a start of its own. Leave it out."
            )
