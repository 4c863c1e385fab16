"""One small configuration per method: what the laws run over. A new method adds one line."""

from coadapt import (
    BitFitConfig,
    BottleneckConfig,
    FrodConfig,
    FullCopyConfig,
    GraloraConfig,
    IA3Config,
    InvertibleConfig,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from coadapt.config import PeftConfig

CASES: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    "bottleneck": BottleneckConfig(bottleneck_size=4, placement="houlsby"),
    "bitfit": BitFitConfig(),
    "dora": LoraConfig(r=4, use_dora=True, init_lora_weights=False),
    "frod": FrodConfig(sparse_rate=0.1, init_weights=False),
    "full-copy": FullCopyConfig(target_modules=r".*(v_proj|c_proj|dense|SelfAttention\.v|value|second|fc1)"),
    "ia3": IA3Config(),
    "invertible": InvertibleConfig(),
    "ln-tuning": LNTuningConfig(),
    "lily": LilyConfig(r=3, stride_A=2, init_weights=False),
    "loha": LoHaConfig(r=3, alpha=6, init_weights=False),
    "lokr": LoKrConfig(r=2, alpha=4, init_weights=False),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "tokens": TrainableTokensConfig(token_indices=[3, 7, 20]),
    "pvera": PveraConfig(r=5, init_weights=False),
    "randlora": RandLoraConfig(r=6, randlora_alpha=1, init_weights=False),
    "gralora": GraloraConfig(r=4, gralora_k=2, hybrid_r=2, alpha=6, init_weights=False),
    "tinylora": TinyLoraConfig(r=2, u=5, weight_tying=0.5, init_weights="uniform", init_v_bound=1.0),
    "unilora": UniLoraConfig(r=3, theta_d_length=20, init_weights=False),
    "vblora": VBLoRAConfig(r=3, num_vectors=6, vector_length=2, init_vector_bank_bound=0.5),
    "vera": VeraConfig(r=6, init_weights=False),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
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
    "loha-core": LoHaConfig(r=3, use_effective_conv2d=True, init_weights=False),
    "lokr-core": LoKrConfig(
        r=1, decompose_both=True, decompose_factor=3, use_effective_conv2d=True, init_weights=False
    ),
    "unilora-saved": UniLoraConfig(r=3, theta_d_length=20, save_indices=True, init_weights=False),
    "vera-seed": VeraConfig(r=6, save_projection=False, init_weights=False),
    "dora-all-linear": LoraConfig(r=4, use_dora=True, target_modules="all-linear", init_lora_weights=False),
    "p-tuning-lstm": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
    "prefix-projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prefix-decoupled": PrefixTuningConfig(num_virtual_tokens=3, prefix_type="decoupled"),
}
"""Other forms of the same methods."""
