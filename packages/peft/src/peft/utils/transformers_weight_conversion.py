"""How transformers' loader comes from an adapter file's keys to injected parameters."""

from collections.abc import Sequence
from typing import Any

from transformers.core_model_loading import WeightRenaming

from coadapt.config import PeftConfig
from coadapt.core.adapter import attribute
from coadapt.formats.keys import ROOT, present

from ..configs import INJECTED, injected_into
from ..injection import injected


class _OfAdapter(WeightRenaming):
    """ "model.layers.0.q_proj.lora_A.weight" -> "peft_adapters.default.model/layers/0/q_proj/lora_A/weight"."""

    __slots__ = ("adapter_name", "earlier", "peft_config")

    def __init__(self, adapter_name: str, earlier: Sequence[WeightRenaming], peft_config: PeftConfig) -> None:
        super().__init__("^", "^")
        self.adapter_name, self.earlier, self.peft_config = attribute(adapter_name), earlier, peft_config

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        key = source_key.removeprefix(ROOT)
        for renaming in self.earlier:
            key = renaming.rename_source_key(key)[0]
        key = present(key).replace(".", "/")
        model = injected_into(self.peft_config)
        known = injected(model).of(self.adapter_name).stored()
        if key not in known:
            raise ValueError(
                f"{source_key!r} is no tensor of this adapter in a {type(model).__name__}, which has "
                f"{len(known)}, {next(iter(known)).replace('/', '.')!r} among them. Does it fit this model?"
            )
        return f"{INJECTED}.{self.adapter_name}.{key}", None


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: PeftConfig
) -> list[Any]:
    """One renaming for all keys, after those by which transformers renames the base's own."""
    renamings = [entry for entry in weight_conversions or () if isinstance(entry, WeightRenaming)]
    return [_OfAdapter(adapter_name, renamings, peft_config)]
