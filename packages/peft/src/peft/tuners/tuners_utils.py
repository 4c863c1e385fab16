"""What transformers and diffusers look for in a model to steer its adapters."""

from ..injection import BaseTunerLayer as BaseTunerLayer
from ..wrapping import BaseTuner as BaseTuner
