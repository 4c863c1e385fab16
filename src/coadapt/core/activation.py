"""The functions between two layers of a network, by the names that transformers has for them."""

from collections.abc import Mapping
from typing import Any


def activations() -> Mapping[str, Any]:
    """Name -> a new module. Imported here, and not before: with it comes what takes longer to load than torch itself."""
    from transformers.activations import ACT2FN

    return ACT2FN
