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
