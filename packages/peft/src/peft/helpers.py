"""What diffusers takes from here."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Context, of no effect: inputs are never cast; products are made in the dtype of what a layer computes in."""
    yield
