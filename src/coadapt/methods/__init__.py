"""The methods, one file each (SHADOW's stack has another). Importing this package makes all of them known by name."""

import importlib
import pkgutil

from ..config import CONFIGS, PeftConfig
from ..core.method import METHODS

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["CONFIGS", "METHODS", "PeftConfig"]
