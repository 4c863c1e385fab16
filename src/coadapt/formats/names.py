"""What the field's files call the parameters of each method; a method without a line keeps our own names."""

from collections.abc import Mapping

SITES: Mapping[str, Mapping[str, str]] = {
    "LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "DORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight", "m": "lora_magnitude_vector"},
    "ALORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight"},
    "BD_LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "KASA": {"A": "lora_A.weight", "B": "lora_B.weight", "d": "lora_diag"},
    "LOFTQ": {"change.A": "lora_A.weight", "change.B": "lora_B.weight"},
    "QA_LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "VELORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight", "v": "lora_velora_embed"},
    "IA3": {"l": "ia3_l"},
    "TRAINABLE_TOKENS": {"rows": "trainable_tokens_delta"},
    "LN_TUNING": {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
}
"""Method -> parameter (or buffer) at a site -> what follows the path of the site."""

SHARED: Mapping[str, Mapping[str, str]] = {}
"""Method -> parameter (or buffer) of what all sites share -> the whole key in a file."""
