"""A first pass of the bare model, for routers that read its states; its keys and values lie in the call's cache."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .frame import entered

_BEHIND = "_first_pass_from"
"""Attribute of a cache: the number of its layer at which those of the bare model begin."""


@torch.no_grad()
def first_pass(forward: Callable[..., Any], call: dict[str, Any], trains: bool) -> tuple[Tensor, Any]:
    """(B, T, D) what the bare model makes of a call's tokens, and the cache that it has added to, or made.

    What it makes of a token depends on those before it, so that it needs a cache of its own where the call has one. Its
    layers stand in the call's behind the others: what reorders, repeats or crops those does so with these.

    Raises:
        ValueError: the call's cache holds tokens that the bare model has not seen.
    """
    cache = call.get("past_key_values")
    compiling = torch.compiler.is_compiling()
    if cache is not None and compiling:
        raise ValueError("A router that reads the bare model first (XLoraRouter), compiled: use_cache=False.")
    bare = None if cache is None else _bare(cache)
    remembers = {"use_cache": False} if cache is None and (trains or compiling) else {}
    with entered(None):
        out = forward(**{**call, "past_key_values": bare, **remembers})
    return out[0], out.get("past_key_values") if isinstance(out, dict) else bare


def _bare(cache: Any) -> Any:
    """The part of a cache that is the bare model's, as a cache; an empty one where it is empty."""
    past = int(cache.get_seq_length())
    behind = getattr(cache, _BEHIND, None)
    if any(getattr(layer, "is_compileable", False) for layer in cache.layers):
        raise ValueError(
            "A router that reads the bare model first (XLoraRouter) needs the dynamic cache, not a static one."
        )
    if behind is None and not past:
        return copy.deepcopy(cache)
    bare = copy.copy(cache)
    bare.layers = [] if behind is None else cache.layers[behind:]
    if not bare.layers or int(bare.get_seq_length()) != past:
        raise ValueError(
            f"What is active reads the bare model's states first (XLoraRouter), and this cache holds {past} tokens of "
            "calls that did not. Begin a new one: pass whole sequences."
        )
    return bare


def keep(cache: Any, bare: Any) -> None:
    """Puts the bare model's layers behind those of the cache that a call has made or added to."""
    if cache is not None and bare is not None and getattr(cache, _BEHIND, None) is None:
        setattr(cache, _BEHIND, len(cache.layers))
        cache.layers.extend(bare.layers)
