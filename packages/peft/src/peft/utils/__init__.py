"""Names below `peft.utils`, as far as other programs import them."""

from torch import nn

from coadapt import PeftType, TaskType, prepare_model_for_kbit_training, replace_lora_weights_loftq

from ..state import (
    cast_mixed_precision_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    shift_tokens_right,
)
from ..unserved import of_utils as __getattr__  # noqa: F401   mappings of target modules, and such
from .error import NoMatchingPeftModuleError, PeftError, PeftWarning
from .other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TrainableTokensWrapper",
    "_get_submodules",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The module that holds the one at `key`, that one, and its name there."""
    above, _, name = key.rpartition(".")
    return model.get_submodule(above), model.get_submodule(key), name
