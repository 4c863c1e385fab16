"""GGUF files read back by the `gguf` package's own reader."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .names import package


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, as floats."""
    gguf = package()
    reader = gguf.GGUFReader(file)
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors}


def compare(file: Path, meant: Mapping[str, np.ndarray]) -> None:
    """Raises OSError where the file does not hold just these values."""
    found = tensors(file)
    wrong = sorted(found.keys() ^ meant.keys())
    wrong += [name for name in found.keys() & meant.keys() if not np.array_equal(found[name], meant[name])]
    if wrong:
        raise OSError(f"{file} was written, and read back it differs, {wrong[0]!r} for one. Is the disk sound?")
