"""What adapters hold, as dicts of tensors by the keys of adapter files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

import coadapt.model
from coadapt.core import driving
from coadapt.core.adapter import Adapter, attribute
from coadapt.formats import vocabulary
from coadapt.formats.entry import Entry
from coadapt.formats.files import WEIGHTS, read_tensors
from coadapt.formats.keys import entries, present
from coadapt.formats.vocabulary import ROOT

from .configs import INJECTED
from .injection import view_of


def _entries(model: nn.Module, adapter_name: str) -> tuple[Adapter, nn.Module, dict[str, Entry]]:
    view = view_of(model)
    adapter = view.get_adapter(adapter_name)
    return adapter, view.base, {entry.key: entry for entry in entries(adapter, view.base)}


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter by their keys in its file; without "base_model.model." where it is injected, as there.

    Args:
        state_dict: the model's own state, taken as there.
        unwrap_compiled: taken as there; keys are of the model that is not wrapped either way.

    Raises:
        ValueError: there is no such adapter, or `state_dict` does not hold it.
    """
    adapter, base, known = _entries(model, adapter_name)
    if isinstance(model, coadapt.model.PeftModel):
        beside = vocabulary.kept(adapter, base, save_embedding_layers)
        return {**beside, **{key: entry.read().clone() for key, entry in known.items()}}
    found = {key.removeprefix(ROOT): entry.read().clone() for key, entry in known.items()}
    if state_dict is None:
        return found
    given = {key: f"{INJECTED}.{attribute(adapter_name)}.{key.replace('.', '/')}" for key in found}
    if lost := [key for key in given.values() if key not in state_dict]:
        raise ValueError(f"state_dict is not this model's: {lost[0]!r} is missing. Leave it out.")
    return {key: state_dict[where] for key, where in given.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Fills an adapter.

    Returns:
        missing_keys and unexpected_keys: of the adapter; the base's own are not asked for.

    Raises:
        ValueError: tensors of other shapes, all of which are listed; nothing was written.
    """
    adapter, _, known = _entries(model, adapter_name)
    root = "" if isinstance(model, coadapt.model.PeftModel) else ROOT
    given = {
        present(key if key.startswith("base_model.") else root + key): t for key, t in peft_model_state_dict.items()
    }
    wrong = {key for key in given.keys() & known.keys() if tuple(given[key].shape) != tuple(known[key].shape)}
    if wrong and not ignore_mismatched_sizes:
        told = "; ".join(f"{k} is {tuple(given[k].shape)}, needed {tuple(known[k].shape)}" for k in sorted(wrong))
        raise ValueError(f"Tensors of other shapes than the adapter's: {told}.")
    driving.forget(adapter)
    for key in given.keys() & known.keys() - wrong:
        known[key].write(given[key])
    lost, strange = sorted((known.keys() - given.keys()) | wrong), sorted(given.keys() - known.keys())
    return _IncompatibleKeys([k.removeprefix(ROOT) for k in lost], [k.removeprefix(ROOT) for k in strange])


def load_peft_weights(model_id: str | Path, device: str | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter folder. Raises as `coadapt.PeftModel.from_pretrained`."""
    found = read_tensors(Path(model_id) / WEIGHTS)
    return found if device is None else {key: tensor.to(device) for key, tensor in found.items()}


def get_base_model_state_dict(model: coadapt.model.PeftModel) -> dict[str, Tensor]:
    """The base's own state."""
    return model.get_base_model().state_dict()


def set_base_model_state_dict(
    model: coadapt.model.PeftModel, state_dict: Mapping[str, Tensor], strict: bool = True
) -> Any:
    """Loads the base's own state."""
    return model.get_base_model().load_state_dict(state_dict, strict=strict)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes what trains float32, and all else `dtype`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Labels (B, T) as a decoder's input: one to the right, after its start; -100 becomes padding."""
    if pad_token_id is None:
        raise ValueError("shift_tokens_right needs pad_token_id.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], 1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
