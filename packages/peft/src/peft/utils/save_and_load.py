"""By their place there."""

from ..state import get_peft_model_state_dict as get_peft_model_state_dict
from ..state import load_peft_weights as load_peft_weights
from ..state import set_peft_model_state_dict as set_peft_model_state_dict
