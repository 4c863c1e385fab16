"""A method of the base, called on a view, computes what is adapted; the base's own stays the base's."""

import torch
from torch import Tensor

from coadapt import LoraConfig, get_peft_model
from models import ids, plain, stir


def test_a_method_of_the_base_is_adapted() -> None:
    base = plain()

    def encode(self: torch.nn.Module, tokens: Tensor) -> Tensor:
        """Another way in than forward."""
        return self(tokens) * 2

    type(base).encode = encode  # type: ignore[attr-defined]
    try:
        view = get_peft_model(base, LoraConfig(target_modules=["first"]))
        stir(view.adapters)
        assert torch.equal(view.encode(ids()), view(ids()) * 2)
        assert not torch.allclose(view.encode(ids()), base.encode(ids()))
        assert view.encode.__doc__ == encode.__doc__
    finally:
        del type(base).encode  # type: ignore[attr-defined]
