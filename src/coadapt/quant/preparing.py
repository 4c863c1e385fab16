"""What the field's scripts call between loading a quantised base and attaching adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core.store import packed_store, quantised


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Has what is not quantised computed in float32, and switches gradient checkpointing on. Gives `model` back.

    Nothing here needs it: views freeze their base, adapters are in float32 by themselves, and `coadapt train` has
    `gradient_checkpointing`. It is for scripts that call it. Norms, embeddings, head and biases in half precision
    become float32, with bitsandbytes only, as in the field: the residual stream is float32 from then on, steadier and
    of twice the size.

    Args:
        model: a model of transformers; one that is not quantised keeps its dtypes.
        use_gradient_checkpointing: False leaves checkpointing as it is.
        gradient_checkpointing_kwargs: for the model's `gradient_checkpointing_enable`; by default checkpointing without
            reentrance, which needs no input that has gradients.
        auto_clear_cache: give back what CUDA had set aside for weights of the old size.
    """
    model.requires_grad_(False)
    if any(type(store).__module__.endswith(".bnb") for _, _, store in quantised(model)):
        for module in model.modules():
            _widen(module)
        if auto_clear_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
    if use_gradient_checkpointing:
        options = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
    return model


def _widen(module: nn.Module) -> None:
    packed = packed_store(module) is not None
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dtype in (torch.float16, torch.bfloat16) and not (packed and name == "weight"):
            parameter.data = parameter.data.float()
