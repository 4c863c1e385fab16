"""Where a model embeds its input: the module in front of which virtual tokens stand."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from .target import Place


@dataclass(frozen=True)
class Backbone(Place):
    """The module that embeds its input and runs the layers; its role is "encoder" or "decoder"."""

    @property
    def embedding(self) -> nn.Embedding:
        module: Any = self.module
        return module.get_input_embeddings()

    @property
    def width(self) -> int:
        """D of the embedded sequence."""
        return self.embedding.embedding_dim


def backbones(base: Any) -> list[Backbone]:
    """The encoder, then the decoder, that `base` has.

    Raises:
        ValueError: the model is none of transformers', so that nothing says where its input is embedded.
    """
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_input_embeddings"):
        raise ValueError(
            f"Virtual tokens need a transformers model, whose input embedding can be found; this is a "
            f"{type(base).__name__}. Use a method that sits at layers or modules (LoraConfig, BottleneckConfig)."
        )
    if getattr(config, "is_encoder_decoder", False):
        found = [("encoder", base.get_encoder()), ("decoder", base.get_decoder())]
    else:
        causal = getattr(config, "is_decoder", False) or _is_causal(base)
        found = [("decoder" if causal else "encoder", _embeds(base))]
    paths = {id(m): n for n, m in base.named_modules()}
    return [Backbone(paths[id(m)], m, role=role) for role, m in found]


def _embeds(base: Any) -> Any:
    """The innermost model around the input embedding: heads call that one (OPT's skips the model in between)."""
    embedding = base.get_input_embeddings()
    above = [
        m for m in base.modules() if hasattr(m, "get_input_embeddings") and any(c is embedding for c in m.modules())
    ]
    return above[-1]


def _is_causal(base: Any) -> bool:
    marks = [getattr(m, "is_causal", None) for m in base.modules()]
    return bool(getattr(base, "can_generate", lambda: False)()) or any(m is True for m in marks)


def stack_facts(base: Any) -> dict[str, Any]:
    """What files of prompts and prefixes restate of any model: its task, how many stacks and layers it has."""
    stacks = backbones(base)
    generates = getattr(base, "can_generate", lambda: False)()
    found = ("SEQ_2_SEQ_LM" if len(stacks) == 2 else "CAUSAL_LM") if generates else None
    layers = base.config.get_text_config().num_hidden_layers
    return {"task_type": found, "num_transformer_submodules": len(stacks), "num_layers": layers}


def takes_positions(base: Any) -> bool:
    """Whether the positions of the input can be told to the model."""
    return any("position_ids" in inspect.signature(b.module.forward).parameters for b in backbones(base))
