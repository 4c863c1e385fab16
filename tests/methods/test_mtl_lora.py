"""MTL-LoRA: the paper's sum, row by row; what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from coadapt import MTLLoRAConfig, get_peft_model
from models import gpt2, ids, llama, logits, stir


@pytest.mark.parametrize("kind", ["singular_values", "linear"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_papers_sum(kind: str, count: int) -> None:
    layer = nn.Linear(6, 5)
    config = MTLLoRAConfig(
        r=2, num_tasks=3, n_up_projection=count, task_specific_matrix_type=kind, target_modules=["layer"], lora_alpha=3
    )
    view = get_peft_model(Held(layer), config)
    stir(view.adapters, by=0.5)
    method: Any = view.eval().get_adapter("default").parts[0].method
    x = torch.randn(3, 4, 6)
    found = view(x, task_ids=[2, 0, 1])
    for row, task in enumerate([2, 0, 1]):
        weights = (method.v[task] / 0.05).softmax(0) if count > 1 else torch.ones(1)
        middle = torch.diag(method.L[task]) if kind == "singular_values" else method.L[task]
        change = sum(weights[i] * method.B[i] @ middle @ method.A for i in range(count))
        torch.testing.assert_close(found[row], layer(x[row]) + 1.5 * x[row] @ change.T, rtol=1e-5, atol=1e-5)


class Held(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_row_is_of_its_task(make: Any) -> None:
    view = get_peft_model(make(), MTLLoRAConfig(r=2, num_tasks=3, n_up_projection=2)).eval()
    before = logits(view, task_ids=[0, 1, 2])
    assert torch.equal(before, logits(view, adapters=[]))
    stir(view.adapters, by=0.5)
    together = logits(view, task_ids=[2, 0, 1])
    for row, task in enumerate([2, 0, 1]):
        alone = logits(view, ids()[row : row + 1], task_ids=[task])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    view = get_peft_model(llama(), MTLLoRAConfig(num_tasks=2))
    with pytest.raises(ValueError, match="a weight for each of 2 tasks"):
        view.merge_adapter()
    with pytest.raises(ValueError, match="weights_sharpness=0 must be above 0"):
        MTLLoRAConfig(weights_sharpness=0)
