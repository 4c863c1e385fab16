"""What SHADOW's state comes from: a small stack, made new by the class of the model's own, with other sizes."""

import copy
import inspect
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.backbone import Backbone
from ..core.roles import path_of
from ..core.site import plain_class
from ..core.stream import Source

_NAMES = {
    "shadow_num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "shadow_hidden_size": ("hidden_size", "n_embd", "d_model"),
    "shadow_intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "shadow_num_attention_heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""Options -> what configurations of models call it."""


def width_of(config: Any) -> int:
    """D of a stack's hidden states."""
    return next(getattr(config, name) for name in _NAMES["shadow_hidden_size"] if hasattr(config, name))


class Mirror(Source):
    """s0 = P stack(e), (B, T, D): P only where the widths differ.

    Args:
        sizes: by the names of `ShadowConfig`; None for the model's own.
        shares: whether it reads what the model has embedded.
    """

    def __init__(self, place: Backbone, sizes: Mapping[str, int | None], shares: bool, weight: float) -> None:
        super().__init__()
        stack: Any = place.module
        config = _resized(stack.config, sizes)
        inner, self.width = width_of(config), width_of(stack.config)
        self.key, self.weight, self.embeds_itself = uuid.uuid4().hex, weight, not shares or inner != self.width
        if not self.embeds_itself:
            config.vocab_size, config.pad_token_id = 1, None  # nothing looks ids up, so no table is made for them
        self.backbone: Any = plain_class(type(stack))(config)
        self.without: str | None = None
        """The embedding that is not there."""
        if not self.embeds_itself:
            table = self.backbone.get_input_embeddings()
            self.without = path = path_of(self.backbone, table)
            owner, _, name = path.rpartition(".")
            setattr(self.backbone.get_submodule(owner), name, None)
        self.projection = nn.Identity() if inner == self.width else nn.Linear(inner, self.width, bias=False)
        self.names = tuple(inspect.signature(self.backbone.forward).parameters)

    def begin(self, tokens: Tensor, call: Mapping[str, Any], cache: Any) -> tuple[Tensor, Any]:
        told = {name: call.get(name) for name in ("attention_mask", "position_ids") if name in self.names}
        caches = True if call.get("past_key_values") is not None else call.get("use_cache")
        if self.embeds_itself:
            told["input_ids"] = tokens
        else:
            told["inputs_embeds"] = tokens.to(next(self.backbone.parameters()).dtype)
        out = self.backbone(**told, past_key_values=cache, use_cache=caches, return_dict=True)
        return self.projection(out.last_hidden_state), out.past_key_values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mirror":
        """Constants (the frequencies of rotary positions) stay as they were worked out: they lie in no file, so that
        they would be lost on the meta device, and are not rounded."""
        kept = [(m, n, b) for m in self.backbone.modules() for n, b in m.named_buffers(recurse=False)]
        super()._apply(fn, recurse)
        for module, name, before in kept:
            now = module.get_buffer(name)
            module._buffers[name] = before if now.is_meta else before.to(now.device)
        return self


def _resized(config: Any, sizes: Mapping[str, int | None]) -> Any:
    """A copy of a model's configuration with other sizes. Raises ValueError where one has no place, or does not fit."""
    small = copy.deepcopy(config)
    for option, size in sizes.items():
        if size is not None:
            name = next((n for n in _NAMES[option] if hasattr(small, n)), None)
            if name is None:
                raise ValueError(
                    f"ShadowConfig: {option}={size} has no place in a {type(config).__name__}, which has none of "
                    f"{', '.join(_NAMES[option])}. Leave it out."
                )
            setattr(small, name, size)
    if hasattr(small, "word_embed_proj_dim"):  # OPT's, of what it embeds and of what it gives
        small.word_embed_proj_dim = width_of(small)
    layers = small.num_hidden_layers
    if kinds := getattr(small, "layer_types", None):
        small.layer_types = [*kinds, *[kinds[-1]] * layers][:layers]
    if getattr(small, "max_window_layers", None) is not None:
        small.max_window_layers = min(small.max_window_layers, layers)
    heads, width = small.num_attention_heads, width_of(small)
    shared = getattr(small, "num_key_value_heads", None) or 1
    if heads % shared or (width % heads and not getattr(small, "head_dim", None)):
        raise ValueError(
            f"ShadowConfig: {heads} attention heads fit neither hidden states of {width} nor {shared} heads of keys "
            "and values. Pick shadow_num_attention_heads that both allow."
        )
    return small
