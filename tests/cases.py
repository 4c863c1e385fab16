"""One small configuration per method: what the laws run over. A new method adds one line."""

from coadapt import (
    BitFitConfig,
    BottleneckConfig,
    FullCopyConfig,
    IA3Config,
    InvertibleConfig,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
)
from coadapt.config import PeftConfig

CASES: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    "bottleneck": BottleneckConfig(bottleneck_size=4, placement="houlsby"),
    "bitfit": BitFitConfig(),
    "a-lora": LoraConfig(r=4, alora_invocation_tokens=[28], init_lora_weights=False),
    "bd-lora": LoraConfig(
        r=4, use_bdlora={"target_modules_bd_a": ["v"], "nblocks": 2, "match_strict": False}, init_lora_weights=False
    ),
    "kasa": LoraConfig(r=2, lora_alpha=4, kasa_config={}, init_lora_weights=False),
    "loftq": LoraConfig(r=2, lora_alpha=4, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 2}),
    "qa-lora": LoraConfig(r=4, use_qalora=True, qalora_group_size=2, init_lora_weights=False),
    "velora": LoraConfig(r=4, velora_config={"num_groups": 3, "init_type": "random"}, init_lora_weights=False),
    "dora": LoraConfig(r=4, use_dora=True, init_lora_weights=False),
    "full-copy": FullCopyConfig(target_modules=r".*(v_proj|c_proj|dense|SelfAttention\.v|value|second|fc1)"),
    "ia3": IA3Config(),
    "invertible": InvertibleConfig(),
    "ln-tuning": LNTuningConfig(),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
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
    "lora-pissa": LoraConfig(r=2, lora_alpha=4, init_lora_weights="pissa"),
    "lora-mica": LoraConfig(r=2, init_lora_weights="mica"),
    "dora-pissa": LoraConfig(r=2, use_dora=True, init_lora_weights="pissa"),
    "lora-own-bias": LoraConfig(r=2, lora_bias=True, init_lora_weights=False),
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
}
"""Other forms of the same methods."""
