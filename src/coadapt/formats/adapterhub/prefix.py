"""Prefixes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...config import PeftConfig
from ...core import roles
from ...core.activation import activations
from ...core.adapter import Adapter
from ...methods.prefix import PrefixTuning, PrefixTuningConfig
from .tensors import Fill, Tensors, activation, copy

_PREFIXES = {"encoder": "encoder_prefix", "cross": "cross_prefix"}


def read(config: Mapping[str, Any], tensors: Tensors, base: Any) -> tuple[PeftConfig, Fill]:
    """Joined behind rotary embedding, and real tokens keep their positions; a network is worked out once."""
    (path,) = tensors.paths("prefix_tunings")
    n = int(config["prefix_length"])
    if any(hasattr(place.module, "compute_bias") for place in roles.attentions(base)):
        raise ValueError(
            f"AdapterHub's prefixes move the relative positions of {type(base).__name__}'s keys against its queries, "
            "which is not done here; so they are not read."
        )
    made = PrefixTuningConfig(num_virtual_tokens=n, position_offset=0)

    def fill(adapter: Adapter) -> None:
        by_role: dict[str, list[PrefixTuning]] = {}
        for part in adapter.parts:
            assert isinstance(part.method, PrefixTuning)
            by_role.setdefault(part.place.role, []).append(part.method)
        for role, methods in by_role.items():
            group = _PREFIXES[role] if len(by_role) > 1 and role in _PREFIXES else "self_prefix"
            _, two, heads, dim = methods[0].shape
            whole = _made(config, tensors, path, group).view(n, len(methods), two, heads, dim)
            for i, method in enumerate(methods):
                copy(whole[:, i], method.P, group)

    return made, fill


def _made(config: Mapping[str, Any], tensors: Tensors, path: str, group: str) -> Tensor:
    def take(rest: str) -> Tensor:
        return tensors.take("prefix_tunings", path, f"{group}.{rest}")

    if config.get("flat"):
        return take("control_trans")
    hidden = take("wte.weight") @ take("control_trans.0.weight").mT + take("control_trans.0.bias")
    hidden = activations()[activation(config["non_linearity"])](hidden)
    return hidden @ take("control_trans.2.weight").mT + take("control_trans.2.bias")
