"""What transformers calls on models with injected adapters."""

from typing import Any

from torch import nn

from .configs import INJECTED
from .injection import inject_adapter_in_model, injected
from .state import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
]


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "", layer_cls: Any = None) -> None:
    """Takes an injected adapter away. `prefix` and `layer_cls` are taken as there: adapters are known by name."""
    injected(model).delete_adapter(adapter_name)
    if model._modules[INJECTED] is None:
        del model._modules[INJECTED]


def set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Makes injected adapters active. What trains stays as it is."""
    injected(model).set_adapter(adapter_name)
