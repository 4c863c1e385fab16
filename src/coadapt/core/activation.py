"""The functions between two layers of a network, by the names that transformers has for them."""

from collections.abc import Mapping
from typing import Any


def activations() -> Mapping[str, Any]:
    """Name -> a new module. Imported when one is asked for: what comes with it takes as long to load as torch."""
    from transformers.activations import ACT2FN

    return ACT2FN
