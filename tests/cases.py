"""One small configuration per method: what the laws run over. A new method adds one line."""

from coadapt import (
    AdaLoraConfig,
    AdamssConfig,
    BeftConfig,
    BitFitConfig,
    BottleneckConfig,
    C3AConfig,
    FourierFTConfig,
    FullCopyConfig,
    IA3Config,
    InvertibleConfig,
    LNTuningConfig,
    LoraConfig,
    OSFConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    SupertuningConfig,
    TrainableTokensConfig,
    WaveFTConfig,
)
from coadapt.config import PeftConfig

CASES: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    "bottleneck": BottleneckConfig(bottleneck_size=4, placement="houlsby"),
    "bitfit": BitFitConfig(),
    "dora": LoraConfig(r=4, use_dora=True, init_lora_weights=False),
    "full-copy": FullCopyConfig(target_modules=r".*(v_proj|c_proj|dense|SelfAttention\.v|value|second|fc1)"),
    "ia3": IA3Config(),
    "invertible": InvertibleConfig(),
    "ln-tuning": LNTuningConfig(),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "tokens": TrainableTokensConfig(token_indices=[3, 7, 20]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "adamss-asa": AdamssConfig(
        r=8, num_subspaces=3, use_asa=True, asa_target_subspaces=1, init_warmup=1, final_warmup=5, mask_interval=2
    ),
    "adamss": AdamssConfig(r=8, num_subspaces=3),
    "waveft": WaveFTConfig(n_frequency=12, wavelet_family="db2", init_weights=False),
    "osf": OSFConfig(effective_rank=0.4),
    "supertuning": SupertuningConfig(sparsity=0.8),
    "adalora": AdaLoraConfig(total_step=9, init_r=4, target_r=2),
    "shira": ShiraConfig(r=1, init_weights=False),
    "c3a": C3AConfig(block_size=2),
    "beft": BeftConfig(init_weights=False),
    "fourierft": FourierFTConfig(n_frequency=12, scaling=10.0),
}
"""One per registered method; a test fails where one is missing."""

VARIANTS: dict[str, PeftConfig] = {
    "lora-all-linear": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "lora-experts": LoraConfig(
        r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"], init_lora_weights=False
    ),
    "lora-tokens": LoraConfig(r=2, trainable_token_indices=[3, 7, 20], init_lora_weights=False),
    "lora-bias": LoraConfig(r=4, bias="lora_only", init_lora_weights=False),
    "bottleneck-pfeiffer": BottleneckConfig(bottleneck_size=4, adapter_layer_norm="before"),
    "bottleneck-parallel": BottleneckConfig(bottleneck_size=4, placement="parallel", scaling="learned"),
    "language": BottleneckConfig(bottleneck_size=4, inv_adapter="nice"),
    "dora-all-linear": LoraConfig(r=4, use_dora=True, target_modules="all-linear", init_lora_weights=False),
    "p-tuning-lstm": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
    "prefix-projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prefix-decoupled": PrefixTuningConfig(num_virtual_tokens=3, prefix_type="decoupled"),
    "supra": SupertuningConfig(sparsity=0.8, r=2, select_top=False, save_precomputed_indices=False),
    "waveft-entries": WaveFTConfig(n_frequency=12, proportional_parameters=True, use_idwt=False, init_weights=False),
    "adamss-ranks": AdamssConfig(r=8, num_subspaces=3, subspace_rank=2, use_dynamic_rank=True, init_weights=None),
}
"""Other forms of the same methods."""
