"""What the field's files call the parameters of each method; a method without a line keeps our own names."""

from collections.abc import Mapping, Sequence

SITES: Mapping[str, Mapping[str, str]] = {
    "ADAPTION_PROMPT": {"P": "adaption_prompt", "gate": "adaption_gate"},
    "LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "DORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight", "m": "lora_magnitude_vector"},
    "POLY": {"A": "poly_lora_A", "B": "poly_lora_B", "Z": "poly_router.module_logits"},
    "ALORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight"},
    "BD_LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "KASA": {"A": "lora_A.weight", "B": "lora_B.weight", "d": "lora_diag"},
    "LOFTQ": {"change.A": "lora_A.weight", "change.B": "lora_B.weight"},
    "QA_LORA": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "VELORA": {"change.A": "lora_A.weight", "change.B": "lora_B.weight", "v": "lora_velora_embed"},
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
    "HIRA": {"A": "hira_A", "B": "hira_B"},
    "DELORA": {"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "n": "delora_w_norm"},
    "GLORA": {part: f"glora_{part}" for part in "ABCDE"},
    "BOFT": {"A": "boft_R", "s": "boft_s"},
    "PSOFT": {"Q": "psoft_R.weight", "b": "psoft_R.vector_b", "a": "psoft_R.vector_a"},
    "DEFT": {"P": "deft_P", "R": "deft_R"},
    "PEANUT": {
        "A": "peanut_A.weight",
        "B": "peanut_B.weight",
        "encoders": "peanut_encoders",
        "decoders": "peanut_decoders",
    },
    "MISS": {"D": "miss_block"},
    "BAT": {"D": "miss_block"},
    "HRA": {"U": "hra_u"},
    "ROAD": {"theta": "road_theta", "alpha": "road_alpha"},
    "OFT": {"Q": "oft_R.weight"},
    "COFT": {"Q": "oft_R.weight"},
    "LN_TUNING": {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
    "FOURIERFT": {"c": "fourierft_spectrum"},
    "BEFT": {"delta": "beft_bias"},
    "C3A": {"w": "c3a_kernel"},
    "SHIRA": {"s": "shira_weight", "at": "shira_indices"},
    "ADALORA": {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
}
"""Method -> parameter (or buffer) at a site, or the module that holds it -> what follows the path of the site."""

EMBEDDED: Mapping[str, Mapping[str, str]] = {
    "LORA": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
    "DORA": {"change.A": "lora_embedding_A", "change.B": "lora_embedding_B"},
    "KASA": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
    "LOFTQ": {"change.A": "lora_embedding_A", "change.B": "lora_embedding_B"},
    "HIRA": {"A": "hira_embedding_A", "B": "hira_embedding_B"},
    "OFT": {"Q": "oft_embedding_R.weight"},
    "COFT": {"Q": "oft_embedding_R.weight"},
}
"""The same at embeddings, where it differs there."""

TAKES: Mapping[str, Sequence[str]] = {
    "DELORA": ("Linear",),
    "BOFT": ("Linear",),
    "PSOFT": ("Linear",),
    "DEFT": ("Linear", "Conv1D"),
    "PEANUT": ("Linear",),
    "GLORA": ("Linear",),
    "MISS": ("Linear",),
    "BAT": ("Linear",),
    "HRA": ("Linear",),
    "ROAD": ("Linear",),
    "OFT": ("Linear", "Embedding"),
    "COFT": ("Linear", "Embedding"),
}
"""Method -> classes of layers at which the field's library has it and computes the same; without a line, all."""

SHARED: Mapping[str, Mapping[str, str]] = {
    "MULTITASK_PROMPT_TUNING": {"V": "prefix_task_rows"},
}
"""Method -> parameter (or buffer) of what all sites share -> the whole key in a file."""

OLDER: Mapping[str, str] = {"bone_block": "miss_block"}
"""Last parts of keys in older files -> what they are called now."""
