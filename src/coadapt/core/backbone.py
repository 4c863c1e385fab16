"""Where a model embeds its input: the module in front of which virtual tokens stand."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from .roles import Place


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
    """The encoder, then the decoder, that `base` has, as far as they embed tokens (Whisper's encoder does not).

    Raises:
        ValueError: nothing says where the input is embedded, or no part of the model embeds tokens.
    """
    found = _stacks(base)
    paths = {id(m): n for n, m in base.named_modules()}
    tokens = [Backbone(paths[id(m)], m, role=role) for role, m in found if _embeds_tokens(m)]
    if not tokens:
        raise ValueError(
            f"Virtual tokens, and what sits at an embedding of tokens, need one; in {type(base).__name__} "
            f"{' and '.join(_input_of(m) for _, m in found)} makes the input. Use a prefix, or a method that sits at "
            "layers or modules (LoraConfig, BottleneckConfig)."
        )
    return tokens


def stacks(base: Any) -> list[Backbone]:
    """The encoder, then the decoder, whatever their input is made of; none where the model is not transformers'."""
    try:
        found = _stacks(base)
    except (ValueError, NotImplementedError):
        return []
    paths = {id(m): n for n, m in base.named_modules()}
    return [Backbone(paths[id(m)], m, role=role) for role, m in found]


def without_tokens(base: Any) -> dict[str, str]:
    """The roles of stacks whose input is not made of tokens, and the class that makes it."""
    return {role: _input_of(m) for role, m in _stacks(base) if not _embeds_tokens(m)}


def _stacks(base: Any) -> list[tuple[str, Any]]:
    config = getattr(base, "config", None)
    if config is None or not hasattr(base, "get_input_embeddings"):
        raise ValueError(
            f"Virtual tokens, and what sits at the embedding of tokens, need a transformers model, in which that is "
            f"found; this is a {type(base).__name__}. Use a method that sits at layers or modules (LoraConfig, "
            "BottleneckConfig)."
        )
    if getattr(config, "is_encoder_decoder", False):
        return [("encoder", base.get_encoder()), ("decoder", base.get_decoder())]
    causal = getattr(config, "is_decoder", False) or _is_causal(base)
    return [("decoder" if causal else "encoder", _embeds(base))]


def _embeds_tokens(stack: Any) -> bool:
    return isinstance(stack.get_input_embeddings(), nn.Embedding)


def _input_of(stack: Any) -> str:
    return type(stack.get_input_embeddings()).__name__


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
    stacks = _stacks(base)
    generates = getattr(base, "can_generate", lambda: False)()
    found = ("SEQ_2_SEQ_LM" if len(stacks) == 2 else "CAUSAL_LM") if generates else None
    layers = base.config.get_text_config().num_hidden_layers
    return {"task_type": found, "num_transformer_submodules": len(stacks), "num_layers": layers}


def takes_positions(base: Any) -> bool:
    """Whether the positions of the input can be told to the model."""
    return any(_tells_positions(m) and _embeds_tokens(m) for _, m in _stacks(base))


def _tells_positions(stack: nn.Module) -> bool:
    return "position_ids" in inspect.signature(stack.forward).parameters


def counts_by_mask(stack: nn.Module) -> bool:
    """Whether a stack reads positions off the attention mask where none are given (OPT), so that padding has none."""
    return any("attention_mask" in inspect.signature(m.forward).parameters for m in _tables(stack))


def counts_alone(stack: Any) -> bool:
    """Whether a stack looks positions up in a table and cannot be told them: token i of a row has position i."""
    return bool(_tables(stack)) and not _tells_positions(stack)


def _tables(stack: Any) -> list[nn.Module]:
    """Embeddings beside that of the tokens: of positions, as a rule."""
    embedding = stack.get_input_embeddings()
    return [m for m in stack.children() if isinstance(m, nn.Embedding) and m is not embedding]
