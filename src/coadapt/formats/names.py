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
    "MONTECLORA": {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "v": "lora_monteclora_sampler.std_prior",
        "c": "lora_monteclora_sampler.expert_weights_prior",
    },
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
    "FROD": ("Linear", "Conv1D"),
    "GRALORA": ("Linear", "Conv1D"),
    "LOHA": ("Linear", "Conv1d", "Conv2d"),
    "LOKR": ("Linear", "Conv1d", "Conv2d"),
    "LILY": ("Linear",),
    "PVERA": ("Linear", "Conv1D"),
    "RANDLORA": ("Linear", "Conv1D"),
    "TINYLORA": ("Linear", "Conv1D", "Embedding"),
    "UNILORA": ("Linear", "Conv1D"),
    "VBLORA": ("Linear", "Conv1D"),
    "VERA": ("Linear", "Conv1D"),
    "MONTECLORA": ("Linear", "Conv1D"),
    "OFT": ("Linear", "Embedding"),
    "COFT": ("Linear", "Embedding"),
}
"""Method -> classes of layers at which the field's library has it and computes the same; without a line, all."""

SHARED: Mapping[str, Mapping[str, str]] = {
    "MULTITASK_PROMPT_TUNING": {"V": "prefix_task_rows"},
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

OLDER: Mapping[str, str] = {"bone_block": "miss_block"}
"""Last parts of keys in older files -> what they are called now."""
