"""How transformers' loader comes from an adapter file's keys to injected parameters."""

from collections.abc import Sequence
from typing import Any

from transformers.core_model_loading import WeightRenaming

from coadapt.core.adapter import attribute
from coadapt.formats.keys import ROOT, present

from ..configs import INJECTED


class _OfAdapter(WeightRenaming):
    """ "model.layers.0.q_proj.lora_A.weight" -> "peft_adapters.default.model/layers/0/q_proj/lora_A/weight"."""

    __slots__ = ("adapter_name", "earlier")

    def __init__(self, adapter_name: str, earlier: Sequence[WeightRenaming]) -> None:
        super().__init__("^", "^")
        self.adapter_name, self.earlier = attribute(adapter_name), earlier

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        key = source_key.removeprefix(ROOT)
        for renaming in self.earlier:
            key = renaming.rename_source_key(key)[0]
        return f"{INJECTED}.{self.adapter_name}.{present(key).replace('.', '/')}", None


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """One renaming for all keys, after those by which transformers renames the base's own."""
    renamings = [entry for entry in weight_conversions or () if isinstance(entry, WeightRenaming)]
    return [_OfAdapter(adapter_name, renamings)]
