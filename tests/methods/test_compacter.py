"""Compacter and Adapter+: Kronecker products and scales written out, what is shared, and what is dropped."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from coadapt import AdapterPlusConfig, BottleneckConfig, CompacterConfig, get_peft_model
from models import ids, llama, logits, stir


@pytest.mark.parametrize("options", [{}, {"phm_rank": 2}, {"factorized_phm_W": False}, {"shared_phm_rule": False}])
def test_matrices_are_sums_of_kronecker_products(options: dict[str, Any]) -> None:
    """Equations 3 and 5 of the paper, and the bottleneck that they make."""
    view = get_peft_model(llama(), CompacterConfig(bottleneck_size=8, phm_dim=4, **options))
    stir(view.adapters, by=0.3)
    adapter: Any = view.get_adapter("default")
    method: Any = adapter.parts[0].method
    for layer in (method.down, method.up):
        rule = adapter.shared.A if options.get("shared_phm_rule", True) else layer.rule.A
        large = (
            layer.whole
            if layer.whole is not None
            else torch.stack([s @ t for s, t in zip(layer.s, layer.t, strict=True)])
        )
        whole = sum(torch.kron(rule[i], large[i]) for i in range(4))
        torch.testing.assert_close(layer.weight, whole)
    y = torch.randn(2, 3, 32)
    expected = y + F.gelu(y @ method.down.weight.T + method.down.bias) @ method.up.weight.T + method.up.bias
    torch.testing.assert_close(method(y, lambda x: x), expected)


def test_the_small_factors_are_of_all_layers() -> None:
    """What the paper counts: n^3 once, and at each site 2 R (D + m) and the biases."""
    view = get_peft_model(llama(), CompacterConfig(bottleneck_size=8))
    count = sum(p.numel() for p in view.parameters() if p.requires_grad)
    assert count == 4**3 + 4 * (2 * (32 + 8) + 32 + 8)
    stir(view.adapters)
    logits(view).square().mean().backward()
    rule: Any = view.get_adapter("default").shared
    assert bool((rule.A.grad != 0).all())


def test_adapter_plus_is_a_bottleneck_with_scales() -> None:
    config = AdapterPlusConfig(bottleneck_size=4)
    same = BottleneckConfig(
        bottleneck_size=4, scaling="channel", init_weights="houlsby", stochastic_depth=0.1, non_linearity="gelu"
    )
    assert config.to_dict() == same.to_dict()
    view = get_peft_model(llama(), config).eval()
    method: Any = view.get_adapter("default").parts[0].method
    assert 0.005 < float(method.up.weight.detach().std()) < 0.015
    assert method.scale.shape == (32,)
    stir(view.adapters, by=0.3)
    y = torch.randn(2, 3, 32)
    change = F.gelu(y @ method.down.weight.T + method.down.bias) @ method.up.weight.T + method.up.bias
    torch.testing.assert_close(method(y, lambda x: x), y + method.scale * change)


def test_rows_do_without_while_it_trains() -> None:
    view = get_peft_model(llama(), BottleneckConfig(bottleneck_size=4, stochastic_depth=0.5))
    stir(view.adapters, by=0.3)
    method: Any = view.get_adapter("default").parts[0].method
    y = torch.randn(64, 3, 32)
    torch.manual_seed(0)
    trained = method.train()(y, lambda x: x) - y
    full = method.eval()(y, lambda x: x) - y
    off = trained.abs().amax(dim=(1, 2)) == 0
    assert 16 < int(off.sum()) < 48
    torch.testing.assert_close(trained[~off], 2 * full[~off], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck_size": 6}, "phm_dim=4 does not divide a layer of 32 inputs and 6 outputs"),
        ({"bottleneck_size": 8, "phm_rank": 0}, "phm_rank=0 must be a whole number"),
        ({"bottleneck_size": 8, "phm_rank": 2, "factorized_phm_W": False}, "phm_rank has no effect"),
        ({"bottleneck_size": 8, "init_weights": "houlsby"}, "is not one of 'zero'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(llama(), CompacterConfig(**options))


def test_the_width_that_is_usual() -> None:
    """The default width is a 32nd of the hidden size."""
    view = get_peft_model(llama(hidden_size=128, intermediate_size=48), CompacterConfig()).eval()
    assert view.get_adapter("default").parts[0].method.down.out_features == 4  # type: ignore[union-attr]
    assert torch.equal(logits(view, ids()), logits(view, ids(), adapters=[]))
