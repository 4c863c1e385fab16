"""What transformers and diffusers look for in a model to steer its adapters."""

from ..injection import BaseTunerLayer as BaseTunerLayer
from ..unserved import unserved_class

BaseTuner = unserved_class("BaseTuner")
