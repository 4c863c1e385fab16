"""Swapping weights of a compiled model in place: coadapt switches adapters instead."""

from ..unserved import unserved_function

check_hotswap_configs_compatible = unserved_function("check_hotswap_configs_compatible")
hotswap_adapter = unserved_function("hotswap_adapter")
hotswap_adapter_from_state_dict = unserved_function("hotswap_adapter_from_state_dict")
prepare_model_for_compiled_hotswap = unserved_function("prepare_model_for_compiled_hotswap")
