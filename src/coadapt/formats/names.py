"""What the field's files call the parameters of each method; a method without a line keeps our own names."""

from collections.abc import Mapping

SITES: Mapping[str, Mapping[str, str]] = {
    "LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "DORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight", "m": "lora_magnitude_vector"},
    "IA3": {"l": "ia3_l"},
    "TRAINABLE_TOKENS": {"rows": "trainable_tokens_delta"},
    "LOHA": {
        "B1": "hada_w1_a",
        "A1": "hada_w1_b",
        "T1": "hada_t1",
        "B2": "hada_w2_a",
        "A2": "hada_w2_b",
        "T2": "hada_t2",
    },
    "LOKR": {
        "C": "lokr_w1",
        "Cb": "lokr_w1_a",
        "Ca": "lokr_w1_b",
        "D": "lokr_w2",
        "Db": "lokr_w2_a",
        "Da": "lokr_w2_b",
        "T": "lokr_t2",
    },
    "LN_TUNING": {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
    "FOURIERFT": {"c": "fourierft_spectrum"},
    "BEFT": {"delta": "beft_bias"},
    "C3A": {"w": "c3a_kernel"},
    "SHIRA": {"s": "shira_weight", "at": "shira_indices"},
    "ADALORA": {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
}
"""Method -> parameter (or buffer) at a site -> what follows the path of the site."""

SHARED: Mapping[str, Mapping[str, str]] = {}
"""Method -> parameter (or buffer) of what all sites share -> the whole key in a file."""
