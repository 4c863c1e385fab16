"""What the field's files call the parameters of each method; a method without a line keeps our own names."""

from collections.abc import Mapping

SITES: Mapping[str, Mapping[str, str]] = {
    "LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "DORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight", "m": "lora_magnitude_vector"},
    "IA3": {"l": "ia3_l"},
    "TRAINABLE_TOKENS": {"rows": "trainable_tokens_delta"},
    "LN_TUNING": {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
    "FOURIERFT": {"c": "fourierft_spectrum"},
    "BEFT": {"delta": "beft_bias"},
    "C3A": {"w": "c3a_kernel"},
    "SHIRA": {"s": "shira_weight", "at": "shira_indices"},
    "ADALORA": {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
    "SUPERTUNING": {
        "s": "supertuning_values",
        "where.at": "supertuning_indices",
        "lora.A": "supertuning_lora_A.weight",
        "lora.B": "supertuning_lora_B.weight",
    },
    "OSF": {"U": "osf_svd_params.U_low", "S": "osf_svd_params.S_low", "V": "osf_svd_params.V_low"},
    "WAVEFT": {"c": "waveft_spectrum"},
    "ADAMSS": {},
    "ASA": {},
}
"""Method -> parameter (or buffer) at a site -> what follows the path of the site."""

SHARED: Mapping[str, Mapping[str, str]] = {}
"""Method -> parameter (or buffer) of what all sites share -> the whole key in a file."""
