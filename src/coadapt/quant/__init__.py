"""The quantisers, one file each, which is read once its library is loaded; none is imported here.

Each has `store_for(module)`: the store of a module whose weight that library has quantised, or None.
"""

import importlib
import sys
from typing import Any

from torch import nn

from ..core.store import FINDERS, Packed

LIBRARIES = {
    "bitsandbytes.nn": "bnb",
    "torchao.quantization": "ao",
    "hqq.core.quantize": "hqq",
    "gptqmodel.nn_modules.qlinear": "gptq",
}
"""A library's module with the classes of its layers -> our file."""


def find(module: nn.Module) -> Packed | None:
    """The store of a module whose weight is quantised by one of the libraries that are loaded, or None."""
    for library, file in LIBRARIES.items():
        if library in sys.modules:
            ours: Any = importlib.import_module(f"{__name__}.{file}")
            if (store := ours.store_for(module)) is not None:
                return store
    return None


FINDERS.append(find)
