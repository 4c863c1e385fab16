from collections.abc import Mapping
from dataclasses import dataclass

from ..config import PeftConfig
from ..core.routers import XLoraRouter


@dataclass(frozen=True, kw_only=True)
class XLoraConfig(PeftConfig):
    """Trained LoRAs, mixed for each token by a network that reads what the bare model makes of the text.

    This is no method but a composition: `get_peft_model` loads the adapters and puts an `XLoraRouter` before their sum.
    """

    kind = "XLORA"

    adapters: Mapping[str, str]
    """Names and folders of the LoRAs. A name that is a number, as in the field, becomes expert_<number>."""
    hidden_size: int
    """The model's hidden size."""
    enable_softmax: bool = True
    """The mix adds up to 1."""
    enable_softmax_topk: bool = False
    """The mix of those that top_k_lora keeps adds up to 1."""
    layerwise_scalings: bool = False
    """Each adapted layer has a mix of its own."""
    xlora_depth: int = 1
    """Layers of the network."""
    xlora_size: int = 2048
    """Its width inside."""
    xlora_dropout_p: float = 0.2
    """Share of its inner states that are dropped while training."""
    use_trainable_adapters: bool = False
    """Train the LoRAs along."""
    softmax_temperature: float = 1.0
    """The scores are divided by it."""
    top_k_lora: int | None = None
    """How many adapters a token uses; the others' gates are 0."""
    scaling_pass_value: float = 0.0
    """Only 0: the first pass is the bare model's."""
    global_scaling_weight: float = 1.0
    """All gates are multiplied by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choice("scaling_pass_value", (0.0,))
        if len(self.adapters) < 2:
            raise ValueError(f"XLoraConfig: adapters={dict(self.adapters)!r} names fewer than two; it mixes several.")
        self.router()

    def names(self) -> dict[str, str]:
        """What the adapters are called here -> their folders."""
        return {f"expert_{name}" if name.isdigit() else name: folder for name, folder in self.adapters.items()}

    def router(self) -> XLoraRouter:
        """A new one."""
        return XLoraRouter(
            hidden_size=self.hidden_size,
            depth=self.xlora_depth,
            size=self.xlora_size,
            dropout=self.xlora_dropout_p,
            layerwise=self.layerwise_scalings,
            softmax=self.enable_softmax,
            softmax_top_k=self.enable_softmax_topk,
            top_k=self.top_k_lora,
            temperature=self.softmax_temperature,
            scale=self.global_scaling_weight,
        )
