"""What a call keeps for its backward: beside the frozen model's own, what the method's gradients need and no more."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.setting import attach, ids
from models import llama

TOKENS = 21
"""3 rows of 7."""


def kept(call: Any, own: Iterable[Tensor]) -> Counter[tuple[int, torch.dtype]]:
    """(elements, dtype) of every tensor that `call` keeps for its backward, parameters left out, none counted twice."""
    found: dict[int, tuple[int, torch.dtype]] = {}
    parameters = {p.untyped_storage().data_ptr() for p in own}
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size(), tensor.dtype
        held.append(tensor)  # or its memory would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return Counter(found.values())


def added(case: str, dtype: torch.dtype) -> Counter[tuple[int, torch.dtype]]:
    """What a view of a Llama keeps that the model itself does not, where its embedded input has a gradient."""
    base = llama(num_hidden_layers=1).to(dtype)
    view = attach(base, "llama", case).train()
    embedded = base.get_input_embeddings()(ids()).detach().requires_grad_()
    frozen = kept(lambda: base(inputs_embeds=embedded), base.parameters())
    return kept(lambda: view(inputs_embeds=embedded), [*base.parameters(), *view.parameters()]) - frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "features"),
    [
        ("bitfit", []),
        ("ia3", [16, 16, 48]),  # k and v before they are scaled, the feed-forward part's inner states
        ("dora", [32, 32, 4, 16, 4]),  # the input of q and v, in common; q and v before they are scaled, A x for each
        ("bottleneck", [32, 4, 32, 4]),  # at each of two places its input, and what stands between its layers
    ],
)
def test_each_method_keeps_what_its_gradients_need(case: str, features: list[int], dtype: torch.dtype) -> None:
    """(tokens, features) each, in the dtype of the model: in half precision none in fp32."""
    found = added(case, dtype)
    activations = Counter({(n, d): count for (n, d), count in found.items() if n % TOKENS == 0 and n > TOKENS})
    assert activations == Counter((TOKENS * f, dtype) for f in features), found
