"""Calls of the field that take an injected model as well as a view, or options that coadapt's own do not need."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

import coadapt
from coadapt.core.status import TunerLayerStatus, TunerModelStatus
from coadapt.core.status import get_layer_status as _layers
from coadapt.core.status import get_model_status as _whole

from .injection import injected, view_of
from .views import PeftModel


def _view(model: Any) -> PeftModel:
    return model.view if hasattr(model, "steered") else view_of(model)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """What is attached at each place. Raises ValueError where there are no adapters."""
    view = _view(model)
    if model is view:
        return view.get_layer_status()
    holder = injected(view.base)
    seen = {"enabled": not holder.disable_adapters, "active_adapters": holder.active_adapters}
    return [replace(status, **seen) for status in _layers(view)]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The same of the model as a whole. Raises ValueError where there are no adapters."""
    view = _view(model)
    if model is view:
        return view.get_model_status()
    holder = injected(view.base)
    return replace(
        _whole(view),
        base_model_type=type(view.base).__name__ if isinstance(view.base, PreTrainedModel) else "other",
        adapter_model_type="None",
        enabled=not holder.disable_adapters,
        active_adapters=holder.active_adapters,
    )


def _refuse_compiling(compile_kwargs: Any) -> None:
    if compile_kwargs is not None:
        raise ValueError("compile_kwargs has no effect: singular values are not compiled. Leave it out.")


def convert_to_lora(
    model: nn.Module, rank: Any, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: Any = None
) -> tuple[coadapt.LoraConfig, dict[str, Tensor]]:
    """As `coadapt.convert_to_lora`; of an injected model, too. `progressbar` is taken as there."""
    _refuse_compiling(compile_kwargs)
    return coadapt.convert_to_lora(_view(model), rank, adapter_name)


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: Any,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Any = None,
) -> None:
    """As `coadapt.save_as_lora`; of an injected model, too. `progressbar` is taken as there."""
    _refuse_compiling(compile_kwargs)
    coadapt.save_as_lora(path, _view(model), rank, adapter_name)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """As `coadapt.find_kappa_target_modules`. `show_progress` is taken as there."""
    return coadapt.find_kappa_target_modules(model, top_p, max_dim_size_to_analyze, moe_param_suffixes)
