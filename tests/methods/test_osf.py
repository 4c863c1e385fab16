"""OSF's own: what stays is left alone in any loop, what is not asked of peft, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import OSFConfig, PeftModel
from laws.setting import close


def view_of(layer: nn.Module, **options: Any) -> PeftModel:
    return PeftModel(nn.Sequential(layer), OSFConfig(target_modules=["0"], **options)).train()


def tried(view: PeftModel, x: Tensor) -> Any:
    method: Any = view.get_adapter("default").parts[0].method
    view(x).square().sum().backward()
    return method


@pytest.mark.parametrize("sizes", [(8, 6), (6, 8), (7, 7)])
def test_plain_steps_leave_what_stays(sizes: tuple[int, int]) -> None:
    """By hand, without any optimiser: columns of U stay orthogonal to those that do not train, rows of V too."""
    torch.manual_seed(0)
    layer = nn.Linear(*sizes)
    weight = layer.weight.detach().clone()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    view = view_of(layer, effective_rank=3)
    x = torch.randn(20, sizes[0])
    for _ in range(3):
        method = tried(view, x)
        for parameter in method.parameters():
            parameter.data -= 0.05 * parameter.grad
            parameter.grad = None
    close(u[:, :3].mT @ method.U, torch.zeros(3, len(s) - 3), 1e-5)
    close(v[:3] @ method.V.mT, torch.zeros(3, len(s) - 3), 1e-5)
    changed = method.merge(weight).detach()
    assert float((changed - weight).norm()) > 0.1
    expected = u[:, :3] * s[:3] @ v[:3] + method.U * method.S @ method.V
    close(changed, expected, 1e-5)
    assert torch.equal(layer.weight, weight)


def test_it_starts_as_the_base_to_the_bit() -> None:
    layer = nn.Linear(8, 6).bfloat16()
    x = torch.randn(5, 8).bfloat16()
    assert torch.equal(view_of(layer)(x), layer(x))


def test_small_steps_show_beside_a_base_in_half_precision() -> None:
    """A change of S by 1e-4, which bf16 has no room for beside 1: the output follows."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    view = view_of(layer)
    method: Any = view.get_adapter("default").parts[0].method
    x = torch.randn(200, 64).bfloat16()
    with torch.no_grad():
        method.S.mul_(1.0001)
        down, up, _ = method.factors()
    exact = method.base.start_U * method.base.start_S @ method.base.start_V * 1e-4
    found = (up.bfloat16() @ down.bfloat16()).float()
    assert float((found - exact).norm() / exact.norm()) < 0.02
    assert view(x).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effective_rank": 6}, r"effective_rank=6 keeps 6; at least one must stay"),
        ({"effective_rank": 0}, "effective_rank=0 must be"),
        ({"effective_rank": 1.5}, "effective_rank=1.5 must be"),
        ({"rank_pattern": {"up_proj": 3}}, r"rank_pattern \['up_proj'\] matches none"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view_of(nn.Linear(8, 6), **options)
