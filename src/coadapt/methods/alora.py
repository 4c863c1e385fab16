from torch import Tensor, nn

from ..core.backbone import backbones, without_tokens
from ..core.gates import Gate, Gates
from ..core.invocation import active
from ..core.layer import Layer, kind_of
from ..core.lowrank import Term, added
from ..core.method import ModuleMethod, Place, register
from .lora import LoRA, LoraConfig, OfLoraConfig


@register(LoraConfig, variant="ALORA")
class ALoRA(OfLoraConfig, ModuleMethod):
    """y_t + (alpha / r) B A x_t for the tokens t from the invocation on, y_t = base(x_t) before

    Activated LoRA: Fine-tuned LLMs for Intrinsics, Greenewald et al. 2025, arXiv:2504.12397. The invocation is the last
    occurrence of `alora_invocation_tokens` in a row, its own tokens among those that are adapted; a row without one is
    the base's. Keys and values of the tokens before it are the base's own, so a cache that the base has made goes on
    under the adapter. Not a map of the weight: it cannot be merged. Different from peft, a cache remembers what was
    active, so a loop of your own over a cache generates as `generate` does. Use it for short turns in a long dialogue.
    Parameters per site: r (O + I).
    """

    widens = False

    def __init__(self, config: LoraConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        kind = kind_of(layer.module)
        if kind is None or kind.name != "linear":
            raise ValueError(
                f"aLoRA adapts linear layers; {layer.path!r} is a {type(layer.module).__name__}. Leave it out of "
                "target_modules."
            )
        self.change = LoRA(config, layer)
        self.invoked_by = tuple(config.alora_invocation_tokens or ())

    @classmethod
    def places(cls, config: LoraConfig, base: nn.Module) -> list[Place]:
        roles = [b.role for b in backbones(base)] if hasattr(base, "get_input_embeddings") else []
        if roles != ["decoder"] or without_tokens(base):
            raise ValueError(
                f"LoraConfig: alora_invocation_tokens are looked for in the tokens of a causal language model, which "
                f"{type(base).__name__} is not."
            )
        return LoRA.places(config, base)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        rows, length = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, len(x))
        mask = active(self.invoked_by, rows, length, y.device)
        return added(base, x, y, [Term(self.change, Gates((Gate().times(mask),)))], None)
