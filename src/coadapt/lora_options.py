"""Options of LoRA's starts and variants, under the field's names. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from .config import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Options:
    """A few options that belong together: given as this class, or as a mapping of its fields."""

    @classmethod
    def of(cls, given: Any) -> Self | None:
        """`given` as this class; None for None.

        Raises:
            TypeError: an option that it does not have, or something that is neither.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise TypeError(f"{cls.__name__}: it is given as that class or as a mapping of its options, not {given!r}.")
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} has no option {name!r}.{did_you_mean(str(name), known)} It reads: "
                    f"{', '.join(known)}."
                )
        return cls(**given)

    def choice(self, name: str, allowed: Sequence[str]) -> None:
        """Refuses a field that is none of `allowed`."""
        if (value := getattr(self, name)) not in allowed:
            raise ValueError(f"{type(self).__name__}: {name}={value!r} is not one of {', '.join(map(repr, allowed))}.")

    def at_least(self, bound: float, *names: str) -> None:
        """Refuses fields below a bound."""
        for name in names:
            if not getattr(self, name) >= bound:
                raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} must be at least {bound:g}.")


@dataclass(frozen=True, kw_only=True)
class BdLoraConfig(Options):
    """Which of a LoRA's factors are block-diagonal."""

    target_modules_bd_a: Sequence[str] | None = None
    """Targets (parts of the last part of their names) whose A is block-diagonal."""
    target_modules_bd_b: Sequence[str] | None = None
    """Targets whose B is."""
    nblocks: int = 1
    """How many blocks; the number of devices that share a layer when it is served."""
    match_strict: bool = True
    """Refuse targets that are in neither; False: those are plain LoRAs."""

    def __post_init__(self) -> None:
        self.at_least(1, "nblocks")
        if both := sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())}):
            raise ValueError(f"BdLoraConfig: {both} are in target_modules_bd_a and in target_modules_bd_b; choose one.")


@dataclass(frozen=True, kw_only=True)
class KasaConfig(Options):
    """How strongly KaSA keeps its singular values small and its factors orthogonal."""

    beta: float = 1e-4
    """Of the squared singular values."""
    gamma: float = 1e-3
    """Of how far both factors are from orthogonal."""

    def __post_init__(self) -> None:
        self.at_least(0, "beta", "gamma")


@dataclass(frozen=True, kw_only=True)
class EvaConfig(Options):
    """How EVA shares ranks out among layers, and which tokens it looks at."""

    rho: float = 2.0
    """A layer gets at most this many times its rank; 1: each keeps its own."""
    tau: float = 0.99
    """Enough batches have been seen when directions are as alike as this (their cosine) to those at half as many."""
    use_label_mask: bool = True
    """Leave tokens out whose label is `label_mask_value`."""
    label_mask_value: int = -100
    """That label."""
    whiten: bool = False
    """Divide each direction by the root of its singular value."""
    adjust_scaling_factors: bool = True
    """Keep alpha / r where r changes."""

    def __post_init__(self) -> None:
        self.at_least(1, "rho")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"EvaConfig: tau={self.tau!r} must lie in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class CordaConfig(Options):
    """Which singular values CorDA takes."""

    corda_method: str = "ipm"
    """"ipm": the largest, to learn what the inputs are about; "kpm": the smallest, to keep that."""

    def __post_init__(self) -> None:
        self.choice("corda_method", ("ipm", "kpm"))


@dataclass(frozen=True, kw_only=True)
class LoraGAConfig(Options):
    """How LoRA-GA shares the gradient's singular vectors out, and scales them."""

    direction: str = "ArB2r"
    """Of the first 2 r: A gets the first r and B the others ("ArB2r"), the other way round ("A2rBr"), every second one
    ("ArBr"), or both the same random ones ("random")."""
    scale: str = "stable"
    """"stable" (B times O^(1/4) / sqrt(gamma)), "weight_svd" (as large as the weight), "gd_scale" (both over
    alpha / r) or "unit"."""
    stable_gamma: int = 16
    """gamma."""

    def __post_init__(self) -> None:
        self.choice("direction", ("ArBr", "A2rBr", "ArB2r", "random"))
        self.choice("scale", ("stable", "weight_svd", "gd_scale", "unit"))
        self.at_least(1, "stable_gamma")


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(Options):
    """How LoftQ quantises."""

    loftq_bits: int = 4
    """4 (NF4) or 8."""
    loftq_iter: int = 1
    """How often weight and factors are fitted to each other in turn."""

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ValueError(f"LoftQConfig: loftq_bits={self.loftq_bits!r} is not one of 4, 8.")
        self.at_least(1, "loftq_iter")


@dataclass(frozen=True, kw_only=True)
class MontecloraConfig(Options):
    """How MonteCLoRA draws, and what holds it to its priors."""

    num_samples: int = 8
    """How many samples are mixed in each call."""
    use_entropy: bool = False
    """Keep the weights of the mixture alike."""
    dirichlet_prior: float = 0.1
    """Of each of those weights: the larger, the more alike they are expected to be."""
    sample_scaler: float = 1e-4
    """What the samples are multiplied by."""
    kl_loss_weight: float = 1e-5
    """Of the divergences from the priors."""

    def __post_init__(self) -> None:
        self.at_least(1, "num_samples")
        self.at_least(0, "kl_loss_weight")
        for name in ("dirichlet_prior", "sample_scaler"):
            if not getattr(self, name) > 0:
                raise ValueError(f"MontecloraConfig: {name}={getattr(self, name)!r} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class VeloraConfig(Options):
    """How coarsely VeLoRA keeps activations."""

    num_groups: int = 64
    """Into how many groups features are split: as many numbers are kept of each token."""
    scale: float = 1.0
    """What the approximation is multiplied by."""
    init_type: str = "batch_average"
    """What groups are projected on: their mean in each batch, in the first ("batch_average_once"), or "random"."""

    def __post_init__(self) -> None:
        self.choice("init_type", ("batch_average", "batch_average_once", "random"))
        self.at_least(1, "num_groups")
        if not self.scale > 0:
            raise ValueError(f"VeloraConfig: scale={self.scale!r} must be above 0.")


OPTIONS: Mapping[str, type[Options]] = {
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "loftq_config": LoftQConfig,
    "monteclora_config": MontecloraConfig,
    "velora_config": VeloraConfig,
}
"""Field of a LoraConfig -> the class of what it holds."""

VARIANTS: Mapping[str, str] = {
    "use_dora": "DORA",
    "alora_invocation_tokens": "ALORA",
    "use_bdlora": "BD_LORA",
    "use_qalora": "QA_LORA",
    "kasa_config": "KASA",
    "monteclora_config": "MONTECLORA",
    "velora_config": "VELORA",
}
"""Field of a LoraConfig -> the variant that it asks for."""


def variants(said: Mapping[str, Any]) -> list[str]:
    """The variants that the fields of a LoraConfig ask for, all of them."""
    found = [name for field, name in VARIANTS.items() if said.get(field) not in (None, False)]
    return [*found, "LOFTQ"] if said.get("init_lora_weights") == "loftq" else found
