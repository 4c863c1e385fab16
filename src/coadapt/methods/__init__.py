"""The methods: one file each. Importing this package makes them known by name."""

from ..config import CONFIGS, PeftConfig
from ..core.method import METHODS
from . import bitfit, bottleneck, lora, prefix, prompt

__all__ = ["CONFIGS", "METHODS", "PeftConfig", "bitfit", "bottleneck", "lora", "prefix", "prompt"]
