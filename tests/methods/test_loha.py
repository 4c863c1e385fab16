"""LoHa by the paper's proposition 3, entry by entry, and what it drops while training."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import LoHaConfig, LoKrConfig, PeftModel
from models import stir


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, (3, 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_core_tensors_and_their_gradients() -> None:
    """W' = (T1 x_1 B1 x_2 A1) * (T2 x_1 B2 x_2 A2): the field's library gets the gradients of B1 and B2 wrong."""
    torch.manual_seed(0)
    view = PeftModel(Holder(), LoHaConfig(r=2, alpha=3, target_modules=["layer"], use_effective_conv2d=True))
    stir(view.adapters)
    method: Any = view.get_adapter("default").parts[0].method
    weight = view.base.layer.weight.detach()

    def entry(o: int, i: int, k: int, j: int) -> Tensor:
        both = ((method.T1, method.B1, method.A1), (method.T2, method.B2, method.A2))
        sums = [
            torch.stack([t[p, q, k, j] * b[p, o] * a[q, i] for p in range(2) for q in range(2)]).sum()
            for t, b, a in both
        ]
        return 3 / 2 * sums[0] * sums[1]

    places = [(o, i, k, j) for o in range(4) for i in range(3) for k in range(3) for j in range(2)]
    expected = weight + torch.stack([entry(*place) for place in places]).view(weight.shape)
    torch.testing.assert_close(method.merge(weight), expected)
    chosen, parameters = torch.randn(weight.shape), list(method.parameters())
    assert len(parameters) == 6
    slow = torch.autograd.grad((expected * chosen).sum(), parameters)
    fast = torch.autograd.grad((method.merge(weight) * chosen).sum(), parameters)
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        (LoHaConfig(rank_dropout=0.5, init_weights=False, alpha=64), True),
        (LoKrConfig(rank_dropout=0.5, init_weights=False), False),
        (LoKrConfig(rank_dropout=0.5, rank_dropout_scale=True, init_weights=False), True),
    ],
    ids=["loha", "lokr", "lokr-scaled"],
)
def test_features_go_without_the_change_while_training(config: Any, scaled: bool) -> None:
    torch.manual_seed(0)
    options = {k: v for k, v in config.to_dict().items() if k not in ("target_modules", "peft_type")}
    view = PeftModel(nn.Sequential(nn.Linear(8, 40)), type(config)(target_modules=["0"], **options))
    x = torch.randn(3, 8)
    plain, whole = view.base(x), view.eval()(x)
    made = view.train()(x)
    kept = (made - plain).abs().amax(0) > 1e-6
    assert 0 < int(kept.sum()) < 40
    factor = 40 / int(kept.sum()) if scaled else 1.0
    torch.testing.assert_close(made, plain + torch.where(kept, factor * (whole - plain), 0.0), atol=1e-5, rtol=1e-5)
    view.merge_adapter()
    torch.testing.assert_close(view.base(x), whole)  # merging drops nothing


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_layers_go_without_the_change_while_training(kind: Any) -> None:
    torch.manual_seed(0)
    view = PeftModel(nn.Sequential(nn.Linear(8, 6)), kind(target_modules=["0"], module_dropout=0.5, init_weights=False))
    x = torch.randn(3, 8)
    plain, whole = view.base(x), view.eval()(x)
    view.train()
    seen = {"plain" if torch.allclose(y, plain) else "whole" for y in (view(x) for _ in range(20))}
    assert seen == {"plain", "whole"}
    assert not torch.allclose(plain, whole)
    with pytest.raises(ValueError, match="rank_dropout_scale has no effect"):
        LoKrConfig(rank_dropout_scale=True)
