"""LoHa by its place there."""

from typing import Any

import peft

from .layer import LoHaLayer as LoHaLayer


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(peft, name)
