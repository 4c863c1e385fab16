"""One small configuration per method: what the laws run over. A new method adds one line."""

from coadapt import (
    AdapterPlusConfig,
    AdaptionPromptConfig,
    BitFitConfig,
    BottleneckConfig,
    CartridgeConfig,
    CompacterConfig,
    CPTConfig,
    DiReftConfig,
    FullCopyConfig,
    IA3Config,
    InvertibleConfig,
    LNTuningConfig,
    LoraConfig,
    MTLLoRAConfig,
    MultitaskPromptTuningConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ReftConfig,
    TrainableTokensConfig,
)
from coadapt.config import PeftConfig

CASES: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    "adaption": AdaptionPromptConfig(adapter_len=3, adapter_layers=2),
    "bottleneck": BottleneckConfig(bottleneck_size=4, placement="houlsby"),
    "bitfit": BitFitConfig(),
    "prefix-cartridge": CartridgeConfig(num_virtual_tokens=3),
    "compacter": CompacterConfig(bottleneck_size=4),
    "cpt": CPTConfig(cpt_token_ids=[5, 9, 4], cpt_tokens_type_mask=[1, 2, 3]),
    "dora": LoraConfig(r=4, use_dora=True, init_lora_weights=False),
    "full-copy": FullCopyConfig(target_modules=r".*(v_proj|c_proj|dense|SelfAttention\.v|value|second|fc1)"),
    "ia3": IA3Config(),
    "invertible": InvertibleConfig(),
    "ln-tuning": LNTuningConfig(),
    "mtl-lora": MTLLoRAConfig(r=2, n_up_projection=2),
    "reft": ReftConfig(r=2, suffix_positions=0, dropout=0.0),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "poly": PolyConfig(r=2, n_skills=3, init_weights=False),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "tokens": TrainableTokensConfig(token_indices=[3, 7, 20]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "prompt-multitask": MultitaskPromptTuningConfig(num_virtual_tokens=3, num_ranks=2),
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
    "bottleneck-plus": AdapterPlusConfig(bottleneck_size=4, stochastic_depth=0.0),
    "compacter-whole": CompacterConfig(
        bottleneck_size=4, phm_dim=2, factorized_phm_W=False, shared_phm_rule=False, placement="parallel"
    ),
    "language": BottleneckConfig(bottleneck_size=4, inv_adapter="nice"),
    "dora-all-linear": LoraConfig(r=4, use_dora=True, target_modules="all-linear", init_lora_weights=False),
    "reft-direct": DiReftConfig(
        r=2, prefix_positions=1, suffix_positions=2, non_linearity="gelu", dropout=0.0, layers=[0]
    ),
    "p-tuning-lstm": PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
    "prefix-projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prefix-decoupled": PrefixTuningConfig(num_virtual_tokens=3, prefix_type="decoupled"),
}
"""Other forms of the same methods."""
