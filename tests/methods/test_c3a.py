"""C3A's own: the paper's formula written out, and what the field's library gets wrong."""

from typing import Any

import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution

from coadapt import C3AConfig, PeftModel
from laws.setting import close, far


def test_a_block_is_circulant() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    view = PeftModel(torch.nn.Sequential(layer), C3AConfig(block_size=4, target_modules=["0"]))
    method: Any = view.get_adapter("default").parts[0].method
    x = torch.randn(3, 8)
    expected = layer(x).detach()
    for row in range(3):
        for n in range(2):
            for i in range(4):
                for j in range(4):
                    expected[row, i] += method.w[0, n, (j - i) % 4].detach() * x[row, 4 * n + j] / 8
    close(view(x), expected)


def test_the_fields_gradient_of_the_input_is_another() -> None:
    """Why parity of gradients is tested at one layer: y = x C, so dy/dx is C, and theirs is not."""
    x, w = torch.randn(8, dtype=torch.double, requires_grad=True), torch.randn(1, 2, 4, dtype=torch.double)
    theirs = torch.autograd.functional.jacobian(lambda x: BlockCircularConvolution.apply(x, w), x)
    exact = torch.stack([BlockCircularConvolution.apply(row, w) for row in torch.eye(8, dtype=torch.double)], dim=1)
    close(exact @ x, BlockCircularConvolution.apply(x, w))
    far(theirs, exact)


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block_size=3 does not divide the 8 inputs and 4 outputs .* divisor of 4"):
        PeftModel(torch.nn.Sequential(torch.nn.Linear(8, 4)), C3AConfig(block_size=3, target_modules=["0"]))
