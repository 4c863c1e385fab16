"""Tables, by their older place."""

from .configs import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
from .configs import get_peft_config as get_peft_config
from .injection import inject_adapter_in_model as inject_adapter_in_model
from .views import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from .views import get_peft_model as get_peft_model
