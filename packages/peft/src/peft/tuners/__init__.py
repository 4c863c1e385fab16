"""Configurations and models by their older place."""

from typing import Any

import peft


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(peft, name)
