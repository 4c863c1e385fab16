"""What the field's files call the parameters of each method; a method without a line keeps our own names."""

from collections.abc import Mapping

SITES: Mapping[str, Mapping[str, str]] = {
    "ADAPTION_PROMPT": {"P": "adaption_prompt", "gate": "adaption_gate"},
    "LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "DORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight", "m": "lora_magnitude_vector"},
    "POLY": {"A": "poly_lora_A", "B": "poly_lora_B", "Z": "poly_router.module_logits"},
    "IA3": {"l": "ia3_l"},
    "TRAINABLE_TOKENS": {"rows": "trainable_tokens_delta"},
    "LN_TUNING": {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
}
"""Method -> parameter (or buffer) at a site -> what follows the path of the site."""

SHARED: Mapping[str, Mapping[str, str]] = {
    "MULTITASK_PROMPT_TUNING": {"V": "prefix_task_rows"},
}
"""Method -> parameter (or buffer) of what all sites share -> the whole key in a file."""
