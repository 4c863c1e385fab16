"""One small configuration per method: what the laws run over. A new method adds one line."""

from coadapt import (
    BitFitConfig,
    BOFTConfig,
    BottleneckConfig,
    DeftConfig,
    DeloraConfig,
    FullCopyConfig,
    GloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    InvertibleConfig,
    LNTuningConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeanutConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PsoftConfig,
    RoadConfig,
    TrainableTokensConfig,
)
from coadapt.config import PeftConfig

CASES: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    "bottleneck": BottleneckConfig(bottleneck_size=4, placement="houlsby"),
    "bitfit": BitFitConfig(),
    "boft": BOFTConfig(boft_block_size=0, boft_block_num=1, init_weights=False),
    "deft": DeftConfig(r=2, init_weights=False, alpha=3),
    "delora": DeloraConfig(r=3, init_weights=False),
    "dora": LoraConfig(r=4, use_dora=True, init_lora_weights=False),
    "full-copy": FullCopyConfig(target_modules=r".*(v_proj|c_proj|dense|SelfAttention\.v|value|second|fc1)"),
    "ia3": IA3Config(),
    "glora": GloraConfig(r=2, config_D_E="vector", init_weights=False),
    "hira": HiraConfig(r=3, init_weights=False),
    "hra": HRAConfig(r=3, init_weights=False),
    "invertible": InvertibleConfig(),
    "ln-tuning": LNTuningConfig(),
    "miss": MissConfig(r=3, init_weights=False),
    "bat": MissConfig(r=2, init_weights="bat"),
    "oft": OFTConfig(r=1, oft_block_size=0, use_cayley_neumann=False, init_weights=False),
    "coft": OFTConfig(r=1, oft_block_size=0, coft=True, eps=1.0, init_weights=False),
    "peanut": PeanutConfig(r=3, depth=1, act_fn="tanh", init_weights=False),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "psoft": PsoftConfig(r=3, init_weights=False),
    "road": RoadConfig(variant="road_4", group_size=2, init_weights=False),
    "tokens": TrainableTokensConfig(token_indices=[3, 7, 20]),
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
    "dora-all-linear": LoraConfig(r=4, use_dora=True, target_modules="all-linear", init_lora_weights=False),
    "hra-orthogonal": HRAConfig(r=2, apply_GS=True),
    "boft-butterfly": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, init_weights=False),
    "psoft-free": PsoftConfig(r=2, psoft_orth=False, psoft_mag_a=False, psoft_svd="lowrank", init_weights=False),
    "para": DeftConfig(r=2, para=True, decomposition_method="qr"),
    "glora-vectors": GloraConfig(config_A_B="vector", config_C="vector", config_D_E="none", init_weights=False),
    "miss-mini": MissConfig(r=2, mini_r=2, init_weights="mini"),
    "oft-blocks": OFTConfig(oft_block_size=2, block_share=True, init_weights=False),
    "road-1": RoadConfig(group_size=2, init_weights=False),
    "p-tuning-lstm": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
    "prefix-projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prefix-decoupled": PrefixTuningConfig(num_virtual_tokens=3, prefix_type="decoupled"),
}
"""Other forms of the same methods."""
