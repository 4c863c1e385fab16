"""What all of these files hold, whatever they call it: per module, the factors of a change of its weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

LORA = ("lora_A.weight", "lora_B.weight")
"""(R, I, *K) and (O, R, *1)"""
NAMES: Mapping[str, tuple[str, ...]] = {
    "LORA": (*LORA, "lora_magnitude_vector"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
"""Method -> its tensors at a module, as peft calls them; LyCORIS has the same names for the last two."""


@dataclass
class Changed:
    """The change of one module's weight."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By names of `NAMES`."""
    alpha: float | None = None
    """The change is multiplied by alpha / rank; None: not said, by 1."""

    @property
    def method(self) -> str:
        """LORA, LOHA or LOKR. Raises ValueError where the names are of none of them, or of several."""
        found = [method for method, names in NAMES.items() if set(self.tensors) <= set(names)]
        if not found:
            raise ValueError(f"{sorted(self.tensors)} are not the tensors of a LoRA, a LoHa or a LoKr.")
        return found[0]

    @property
    def rank(self) -> int | None:
        """R; None for a LoKr of whole matrices, which has none."""
        match self.method:
            case "LORA":
                return len(self.tensors[LORA[0]])
            case "LOHA":
                return len(self.tensors["hada_w1_b"])
            case _:
                inner = [self.tensors[n] for n in ("lokr_w2_b", "lokr_w1_b") if n in self.tensors]
                return len(inner[0]) if inner else None

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    def folded(self) -> tuple[Tensor, Tensor]:
        """A and B of a LoRA, with the scale in B."""
        a, b = (self.tensors[name] for name in LORA)
        return a, b if self.scale == 1 else (b.float() * self.scale).to(b.dtype)


Parts = dict[str, dict[str, Changed]]
"""Part of a pipeline ("unet", "text_encoder"; "" for a model by itself) -> path of a module -> what changes there."""


def add(parts: Parts, part: str, path: str, name: str, value: Tensor) -> None:
    """Notes one tensor; "alpha" is a number."""
    changed = parts.setdefault(part, {}).setdefault(path, Changed())
    if name == "alpha":
        changed.alpha = float(value)
    else:
        changed.tensors[name] = value


def checked(parts: Parts) -> Parts:
    """Raises ValueError where a module has a half of something."""
    for part, modules in parts.items():
        for path, changed in modules.items():
            where = f"{part}.{path}".strip(".")
            have = set(changed.tensors)
            pairs = [LORA] if changed.method == "LORA" else [("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")]
            if changed.method != "LOKR" and (lost := [n for pair in pairs for n in pair if n not in have]):
                raise ValueError(f"{where}: {', '.join(lost)} is missing.")
            whole = all(f"lokr_w{i}" in have or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= have for i in (1, 2))
            if changed.method == "LOKR" and not whole:
                raise ValueError(f"{where}: only {', '.join(sorted(have))} of a LoKr is there.")
    if not any(parts.values()):
        raise ValueError("There is no change of a weight in it.")
    return parts


def only_lora(parts: Parts, program: str) -> None:
    """Raises ValueError where something is no plain LoRA."""
    for part, modules in parts.items():
        for path, changed in modules.items():
            if changed.method != "LORA" or "lora_magnitude_vector" in changed.tensors:
                kind = "DoRA" if changed.method == "LORA" else changed.method
                raise ValueError(
                    f"{part}.{path} has a {kind}, which {program} does not read. Write it --to peft, load that onto "
                    "its model, and export the best LoRA of a rank: coadapt export --for peft --r N."
                )


def common(values: list[Any]) -> Any:
    """The most frequent value, the first of equals."""
    return max(dict.fromkeys(values), key=values.count)
