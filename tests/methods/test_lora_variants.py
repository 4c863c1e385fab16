"""LoRA's variants, as far as neither the laws nor the field's folders hold them."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import coadapt
from coadapt import KasaConfig, LoraConfig, get_peft_model
from formats.field import far, field_quietly
from models import MODELS, Holder, ids, logits, stir


def test_qa_lora_pools_groups_of_inputs() -> None:
    """The field's way: the mean of each group, times how many there are."""
    torch.manual_seed(0)
    base = Holder(nn.Linear(12, 5))
    config = LoraConfig(
        r=2, use_qalora=True, qalora_group_size=4, target_modules=["layer"], init_lora_weights=False, lora_alpha=6
    )
    view = get_peft_model(base, config)
    method: Any = view.get_adapter("default").parts[0].method
    x = torch.randn(3, 12)
    pooled = x.view(3, 3, 4).mean(2) * 3
    expected = base.layer(x) + 3 * pooled @ method.A.mT @ method.B.mT
    assert method.A.shape == (2, 3)
    assert far(view(x), expected) < 1e-5
    assert far(view(x), base.layer(x)) > 1e-2
    with pytest.raises(ValueError, match=r"qalora_group_size=5 does not divide the 12 inputs of 'layer'"):
        get_peft_model(base, LoraConfig(use_qalora=True, qalora_group_size=5, target_modules=["layer"]))


def test_kasa_adds_the_gradients_of_its_regularisers_before_a_step() -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    ours = get_peft_model(MODELS["llama"](), LoraConfig(kasa_config=KasaConfig(beta=0.3, gamma=0.2), **options))
    stir(ours.adapters)
    field: Any = field_quietly(
        lambda: peft.get_peft_model(
            MODELS["llama"](), peft.LoraConfig(kasa_config=peft.KasaConfig(beta=0.3, gamma=0.2), **options)
        )
    )
    parts = ours.get_adapter("default").parts
    pairs = []
    for part in parts:
        layer, method = field.base_model.model.get_submodule(part.place.path), part.method
        for mine, theirs in zip(
            (method.A, method.B, method.d),
            (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_diag["default"]),
            strict=True,
        ):
            theirs.data.copy_(mine.data)
            pairs.append((mine, theirs))
    field.base_model._get_kasa_loss().backward()
    ours(input_ids=ids(), labels=ids()).loss.backward()
    expected = [mine.detach() - 0.1 * (mine.grad + theirs.grad) for mine, theirs in pairs]
    torch.optim.SGD([mine for mine, _ in pairs], lr=0.1).step()
    for (mine, theirs), value in zip(pairs, expected, strict=True):
        assert float(theirs.grad.abs().max()) > 1e-4
        assert far(mine, value) < 1e-5


def test_kasa_leaves_the_base_to_others() -> None:
    base = MODELS["llama"]()
    before = logits(base)
    view = get_peft_model(base, LoraConfig(r=4, kasa_config={}, target_modules="all-linear"))
    assert far(logits(view), before) > 1e-3
    assert torch.equal(logits(base), before)
    with pytest.raises(ValueError, match=r"drops r=16 singular values of .*k_proj.* only 16"):
        get_peft_model(base, LoraConfig(r=16, kasa_config={}, target_modules=["k_proj"]))


def test_bd_lora_is_block_diagonal_where_it_was_told() -> None:
    options = {"target_modules_bd_a": ["down"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    config = LoraConfig(r=4, use_bdlora=options, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    view = get_peft_model(MODELS["llama"](), config)
    for part in view.get_adapter("default").parts:
        method: Any = part.method
        a, b, _ = method.factors()
        blocks = (b.view(2, 16, 2, 2) if part.place.path.endswith("q_proj") else a.view(2, 2, 2, 24)).abs().sum((1, 3))
        assert torch.equal(blocks > 0, torch.eye(2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True, "kasa_config": {}}, "DORA and KASA cannot be one adapter"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias and DORA"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias has a start of its own"),
        ({"kasa_config": {}, "init_lora_weights": "olora"}, "KASA has a start of its own"),
        ({"qalora_group_size": 8}, "no effect without use_qalora"),
        ({"kasa_config": {"beta": -1}}, "beta=-1 must be at least 0"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q"]}}, "choose one"),
        ({"target_parameters": ["experts"], "lora_dropout": 0.1}, "lora_dropout would have no effect on experts"),
        ({"target_parameters": []}, "at least one name"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        LoraConfig(**options)


def test_options_of_variants_are_named_and_checked() -> None:
    assert LoraConfig(kasa_config={"beta": 0.5}) == LoraConfig(kasa_config=KasaConfig(beta=0.5))
    assert LoraConfig(kasa_config={}).to_dict()["kasa_config"] == {"beta": 1e-4, "gamma": 1e-3}
    with pytest.raises(TypeError, match=r"KasaConfig has no option 'bta'. Did you mean 'beta'"):
        LoraConfig(kasa_config={"bta": 1})
    with pytest.raises(TypeError, match="or as a mapping"):
        LoraConfig(kasa_config=3)
    base = MODELS["llama"]()
    for options, why in (
        ({"target_modules_bd_a": ["q"]}, "'model.layers.0.self_attn.v_proj' is named neither"),
        ({"target_modules_bd_a": ["q_proj", "v_proj", "up"]}, "name none of the targets"),
        ({"target_modules_bd_a": ["q_proj", "v_proj"], "nblocks": 3}, "nblocks=3 must divide r=8"),
    ):
        with pytest.raises(ValueError, match=why):
            get_peft_model(base, coadapt.LoraConfig(use_bdlora=options))


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
def test_velora_trains_on_what_the_field_keeps(kind: str) -> None:
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    groups = {"num_groups": 5, "scale": 1.5, "init_type": kind}
    ours = get_peft_model(MODELS["llama"](), LoraConfig(velora_config=groups, **options)).train()
    field: Any = field_quietly(
        lambda: peft.get_peft_model(
            MODELS["llama"](), peft.LoraConfig(velora_config=peft.VeloraConfig(**groups), **options)
        )
    ).train()
    pairs = []
    for part in ours.get_adapter("default").parts:
        layer, method = field.base_model.model.get_submodule(part.place.path), part.method
        layer.lora_velora_embed["default"] = method.v.clone()
        for mine, theirs in (
            (method.change.A, layer.lora_A["default"].weight),
            (method.change.B, layer.lora_B["default"].weight),
        ):
            theirs.data.copy_(mine.data)
            pairs.append((mine, theirs))
    for seed in (1, 2):
        for model in (ours, field):
            model.zero_grad()
            model(input_ids=ids(seed=seed), labels=ids(seed=seed)).loss.backward()
        for mine, theirs in pairs:
            assert far(mine.grad, theirs.grad) < 1e-5
    plain = get_peft_model(MODELS["llama"](), LoraConfig(**options)).train()
    for part, other in zip(ours.get_adapter("default").parts, plain.get_adapter("default").parts, strict=True):
        other.method.A.data.copy_(part.method.change.A)
        other.method.B.data.copy_(part.method.change.B)
    plain(input_ids=ids(seed=2), labels=ids(seed=2)).loss.backward()
    gradients = [p.grad for p in plain.parameters() if p.grad is not None]
    assert far(gradients[0], pairs[0][0].grad) > 1e-5, "A's is an approximation"
