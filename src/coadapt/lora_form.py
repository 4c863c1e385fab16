"""Any adapter that changes weights as a LoRA, for programs that read only those: by the field's names."""

from pathlib import Path

from torch import Tensor

from .combining import Options, Report, combine
from .combining.ways import Rank
from .core.adapter import Adapter
from .formats import folder
from .formats.keys import entries
from .methods.lora import LoraConfig
from .model import PeftModel


def convert_to_lora(
    model: PeftModel, rank: Rank, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The best LoRA of a rank that stands for an adapter: its configuration, and its tensors by the keys of its file.

    `model.combine(adapter_name, "svd", r=rank, adapter_name=...)` attaches it instead, and says what was lost.

    Args:
        rank: as `combine`'s `r`: a rank at most, a share of the change that is kept at each site, or "full".

    Raises:
        TypeError: the adapter is no change of weights (a prompt, a bottleneck).
        ValueError: it changes biases or norms alone, or `rank` is out of range.
        RuntimeError: adapters are merged into the base.
    """
    made, _ = _as_lora(model, rank, adapter_name)
    assert isinstance(made.config, LoraConfig)
    return made.config, {entry.key: entry.read().clone() for entry in entries(made, model.base)}


def save_as_lora(path: str | Path, model: PeftModel, rank: Rank, adapter_name: str = "default") -> Report:
    """Writes that LoRA as an adapter folder. Raises as `convert_to_lora`.

    Returns:
        What was lost at each site.
    """
    made, report = _as_lora(model, rank, adapter_name)
    folder.save(Path(path), {"default": made}, "default", model.base, model._record.fingerprint, False)
    return report


def _as_lora(model: PeftModel, rank: Rank, name: str) -> tuple[Adapter, Report]:
    adapter = model.get_adapter(name)
    if model._record.merged_by is not None:
        raise RuntimeError("Adapters are merged into the base; unmerge_adapter() before one is converted.")
    return combine(model.base, {name: adapter}, name, "svd", "default", Options(r=rank))
