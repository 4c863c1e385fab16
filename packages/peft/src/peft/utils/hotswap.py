"""Another adapter in the place of one, in the model as it is."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coadapt.config import PeftConfig
from coadapt.core.adapter import build, replace_options
from coadapt.formats.keys import entries, present
from coadapt.formats.vocabulary import ROOT
from coadapt.methods.lora_config import LoraConfig

from ..configs import injected_as, without_injected
from ..injection import injected, placed, view_of
from ..state import load_peft_weights
from ..views import PeftModel


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raises ValueError where one cannot stand in the place of the other: they are of two methods.

    Ranks, alphas and all else may differ: the new adapter comes with its own.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}.")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Loads an adapter folder into the place of an adapter, whose name, and whether it is active, stays.

    Raises:
        ValueError: it is of another method, or adapters are merged.
        RuntimeError: tensors are missing or left over.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(view_of(model).get_adapter(adapter_name).config, config)
    state = load_peft_weights(model_name_or_path, torch_device)
    hotswap_adapter_from_state_dict(model, state, adapter_name, config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """The same of tensors by the keys of a file, with or without the adapter's name in them.

    Args:
        parameter_prefix: taken as there: what an adapter holds is known.

    Raises: as `hotswap_adapter`.
    """
    view = view_of(model)
    old = view.get_adapter(adapter_name)
    inside = re.compile(rf"(\.lora_\w+)\.{re.escape(adapter_name)}(?=\.|$)")
    given = {present(inside.sub(r"\1", k if k.startswith(ROOT) else ROOT + k)): t for k, t in state_dict.items()}
    options: dict[str, Any] = {"init_seed": 0, "base_model_name_or_path": old.config.base_model_name_or_path}
    if isinstance(config, LoraConfig) and config.init_lora_weights != "loftq":
        options["init_lora_weights"] = True  # its product with the base is in the tensors
    with without_injected(view.base):
        made = build(adapter_name, replace_options(placed(config, given), **options), view.base, blank=True)
    known = {entry.key: entry for entry in entries(made, view.base)}
    if wrong := known.keys() ^ given.keys():
        raise RuntimeError(
            f"Hot swapping did not succeed: {len(wrong)} keys are missing or unexpected, {sorted(wrong)[0]!r}."
        )
    for key, entry in known.items():
        entry.write(given[key])
    made.config = replace_options(made.config, init_seed=None)
    trains = any(p.requires_grad for p in old.parameters())
    made.requires_grad_(trains)
    holder = view if isinstance(model, PeftModel) else injected(model)
    holder.exchange(made)
    if holder is not view:
        known_as: Any = model
        known_as.peft_config[adapter_name] = config
        injected_as(config, made, model)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Makes room for adapters of a rank, so that a swap compiles nothing anew where a view is compiled.

    A compiled model with injected adapters compiles anew at each swap, whatever is done before.

    Args:
        target_rank: the largest of all that will come.
        config, check_compiled: taken as there; room can be made before and after.

    Raises:
        ValueError: there are no adapters, or one has no factors at linear layers or is no LoRA.
    """
    view = view_of(model)
    if not view.peft_config:
        raise ValueError("No adapter layers found on the model; load the first adapter before this call.")
    if target_rank is not None and isinstance(model, PeftModel):
        first = next(iter(view.peft_config.values()))
        if not isinstance(first, LoraConfig):
            raise ValueError(f"target_rank is of LoRAs; there is a {type(first).__name__}. Leave it out.")
        view.reserve(len(view.peft_config), replace_options(first, r=target_rank, rank_pattern={}))
