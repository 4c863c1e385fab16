"""Wrappers that coadapt does not make, and what accelerate asks for FSDP."""

from coadapt import prepare_model_for_kbit_training as prepare_model_for_kbit_training

from ..unserved import of_utils as __getattr__  # noqa: F401   mappings of target modules
from ..unserved import unserved_class, unserved_function

AuxiliaryTrainingWrapper = unserved_class("AuxiliaryTrainingWrapper")
ModulesToSaveWrapper = unserved_class("ModulesToSaveWrapper", AuxiliaryTrainingWrapper)
TrainableTokensWrapper = unserved_class("TrainableTokensWrapper", AuxiliaryTrainingWrapper)
fsdp_auto_wrap_policy = unserved_function("fsdp_auto_wrap_policy")
