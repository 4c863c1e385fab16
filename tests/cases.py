"""One small configuration per method: what the laws run over. A new method adds one line."""

from coadapt import BitFitConfig, BottleneckConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from coadapt.config import PeftConfig

CASES: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    "bottleneck": BottleneckConfig(bottleneck_size=4, placement="houlsby"),
    "bitfit": BitFitConfig(),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
}
"""One per registered method; a test fails where one is missing."""

VARIANTS: dict[str, PeftConfig] = {
    "lora-all-linear": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    "lora-bias": LoraConfig(r=4, bias="lora_only", init_lora_weights=False),
    "bottleneck-pfeiffer": BottleneckConfig(bottleneck_size=4, adapter_layer_norm="before"),
    "bottleneck-parallel": BottleneckConfig(bottleneck_size=4, placement="parallel", scaling="learned"),
    "prefix-projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True),
    "prefix-decoupled": PrefixTuningConfig(num_virtual_tokens=3, prefix_type="decoupled"),
}
"""Other forms of the same methods."""
