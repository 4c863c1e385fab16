"""What a view's state_dict says of itself: configurations, composition and fingerprint, as JSON in a uint8 tensor."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.composition import Node
from .compositions import node_to_json

SCHEMA = 1


def describe(adapters: Mapping[str, Adapter], node: Node, fingerprint: str) -> Tensor:
    """(bytes,) uint8"""
    said = {
        "schema": SCHEMA,
        "adapters": {name: adapter.config.to_dict() for name, adapter in adapters.items()},
        "composition": node_to_json(node),
        "base_fingerprint": fingerprint,
    }
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def read(state: Tensor) -> dict[str, Any]:
    """Undoes `describe`. Raises ValueError where it is of another schema."""
    said = json.loads(bytes(state.tolist()).decode())
    if said.get("schema") != SCHEMA:
        raise ValueError(f"The extra state is of schema {said.get('schema')!r}; this version of coadapt reads {SCHEMA}. Update coadapt.")
    return said


def compare(state: Tensor, adapters: Mapping[str, Adapter]) -> None:
    """Raises ValueError where `state` is of a view with other adapters."""
    theirs, ours = sorted(read(state)["adapters"]), sorted(adapters)
    if theirs != ours:
        raise ValueError(f"This state holds the adapters {theirs}, the view has {ours}. Use PeftModel.from_pretrained to attach what is saved.")
