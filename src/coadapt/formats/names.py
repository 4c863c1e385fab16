"""What the field's files call the parameters of each method; a method without a line keeps our own names."""

from collections.abc import Mapping, Sequence

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
    "VERA": {"b": "vera_lambda_b", "d": "vera_lambda_d"},
    "PVERA": {"b": "pvera_lambda_b", "d": "pvera_lambda_d"},
    "RANDLORA": {"L": "randlora_lambda", "G": "randlora_gamma"},
    "FROD": {"l": "frod_lambda_l", "s": "frod_lambda_s_values"},
    "GRALORA": {
        "A": "gralora_A",
        "B": "gralora_B",
        "A_all": "gralora_A_general.weight",
        "B_all": "gralora_B_general.weight",
    },
    "LILY": {"A": "lily_A.weight", "B": "lily_B.weight", "R": "lily_router.weight"},
    "VBLORA": {"zA": "vblora_logits_A", "zB": "vblora_logits_B"},
    "UNILORA": {
        "iA": "unilora_indices_A",
        "iB": "unilora_indices_B",
        "sA": "unilora_scales_A",
        "sB": "unilora_scales_B",
    },
    "TINYLORA": {"A": "tinylora_A", "B": "tinylora_B", "projections.P": "tinylora_P"},
}
"""Method -> parameter (or buffer) at a site -> what follows the path of the site."""

SHARED: Mapping[str, Mapping[str, str]] = {
    "VERA": {"A": "base_model.vera_A", "B": "base_model.vera_B"},
    "PVERA": {"A": "base_model.pvera_A", "B": "base_model.pvera_B"},
    "RANDLORA": {"A": "base_model.randlora_A", "B": "base_model.randlora_B"},
    "FROD": {
        "V": "base_model.frod_V",
        "entries": "base_model.frod_s_indices",
        "sizes": "base_model.frod_s_size",
    },
    "VBLORA": {"V": "base_model.vblora_vector_bank"},
    "UNILORA": {"theta": "base_model.unilora_theta_d"},
    "TINYLORA": {"v": "base_model.tinylora_v"},
}
"""Method -> parameter (or buffer, or dict of them) of what all sites share -> the whole key in a file."""

NOT_THERE: Mapping[str, Sequence[str]] = {
    "FROD": ("Conv1d", "Conv2d", "Conv3d"),
    "GRALORA": ("Embedding", "Conv1d", "Conv2d", "Conv3d"),
    "LOHA": ("Embedding", "Conv1D", "Conv3d"),
    "LOKR": ("Embedding", "Conv1D", "Conv3d"),
    "LILY": ("Conv1D",),
    "PVERA": ("Embedding",),
    "RANDLORA": ("Embedding", "Conv1d", "Conv2d", "Conv3d"),
    "TINYLORA": ("Conv1d", "Conv2d", "Conv3d"),
    "UNILORA": ("Embedding", "Conv1d", "Conv2d", "Conv3d"),
    "VBLORA": ("Embedding", "Conv1d", "Conv2d", "Conv3d"),
    "VERA": ("Embedding", "Conv1d", "Conv2d", "Conv3d"),
}
"""Method -> classes of layers at which the field's library does not take it, and coadapt does."""
