"""MonteCLoRA draws while it trains as the field's does, and trains what it draws from."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from coadapt import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from formats.field import far, field_quietly
from laws.setting import recompute
from models import MODELS, ids, llama, logits, stir

OPTIONS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
DRAWN: dict[str, Any] = {"num_samples": 3, "sample_scaler": 0.2, "dirichlet_prior": 0.3, "kl_loss_weight": 0.5}


def fresh(**options: Any) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(monteclora_config={**DRAWN, **options}, **OPTIONS)).train()


def methods(view: PeftModel) -> list[Any]:
    return [part.method for part in view.get_adapter("default").parts]


def loss(model: Any) -> Tensor:
    return model(input_ids=ids(), labels=ids()).loss


def test_with_the_same_draws_it_trains_as_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fresh()
    stir(ours.adapters)
    theirs: Any = peft.MontecloraConfig(**DRAWN, buffer_size=1)
    field: Any = field_quietly(
        lambda: peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(monteclora_config=theirs, **OPTIONS))
    ).train()
    pairs = []
    for part in ours.get_adapter("default").parts:
        layer, method = field.base_model.model.get_submodule(part.place.path), part.method
        wishart, weights, samples = drawn = method.draws()
        monkeypatch.setattr(method, "draws", lambda drawn=drawn: drawn)
        sampler = layer.lora_monteclora_sampler["default"]
        same = {"z_mvn": samples.mT, "z_wishart": torch.diag(wishart), "z_dirichlet": weights}
        monkeypatch.setattr(sampler.sampler, "get", lambda same=same: same)
        for mine, other in (
            (method.A, layer.lora_A["default"].weight),
            (method.B, layer.lora_B["default"].weight),
            (method.v, sampler.std_prior),
            (method.c, sampler.expert_weights_prior),
        ):
            other.data.copy_(mine.data)
            pairs.append((mine, other))
    mean = logits(ours.eval())
    assert far(logits(ours.train()), mean) > 1e-2
    assert far(logits(ours), logits(field)) < 1e-5
    for model in (ours, field):
        loss(model).backward()
    for mine, other in pairs:
        assert float(mine.grad.abs().max()) > 1e-7
        assert far(mine.grad, other.grad) < 1e-5 * max(1.0, float(other.grad.abs().max()))


def test_what_is_drawn_has_the_moments_of_its_distributions() -> None:
    method = methods(fresh())[0]
    torch.manual_seed(0)
    drawn = [method.draws()[0] for _ in range(4000)]
    matrices = torch.randn(4000, 4, 4)
    diagonal = (matrices @ matrices.mT).diagonal(dim1=1, dim2=2)  # of a Wishart matrix with four degrees of freedom
    assert far(torch.stack(drawn).mean(0), diagonal.mean(0)) < 0.3
    assert far(torch.stack(drawn).var(0), diagonal.var(0)) < 1.5
    assert far(torch.corrcoef(diagonal.T), torch.eye(4)) < 0.06
    noise = torch.stack([method.noise().detach() for _ in range(500)])
    assert far(noise.mean(0), torch.zeros_like(noise[0])) < 6 * float(noise.std()) / 500**0.5


def test_the_regularisers_are_divergences() -> None:
    """Theirs of the Wishart and the normal distributions are the same, the latter for what is drawn; its Dirichlet's
    has signs wrong."""
    method = methods(fresh())[0]
    torch.manual_seed(1)
    v, c = torch.randn(4) / 3, torch.randn(3)
    sampler = MontecloraSampler(8, 4, 3, dirichlet_prior=0.3, device="cpu")
    mixture = kl_divergence(Dirichlet(c.exp()), Dirichlet(torch.full((3,), 0.3)))
    wishart = sampler.wishart_kl(torch.diag(v.exp()))
    normal = torch.stack(
        [sampler.multivariate_kl(torch.diag((2 * v).exp() * torch.randn(4, 4).square().sum(1))) for _ in range(4000)]
    )
    expected = 0.5 * (mixture + wishart + normal.mean())
    assert abs(float(method.regularisers(v, c) - expected)) < 4 * float(normal.std()) / 4000**0.5
    assert abs(float(sampler.dirichlet_kl(c.exp()) - mixture)) > 0.1
    entropy = float(methods(fresh(use_entropy=True))[0].regularisers(v, c) - method.regularisers(v, c))
    squares = Dirichlet(c.exp()).sample((20000,)).square().sum(1)
    assert abs(entropy - float(squares.mean())) < 4 * float(squares.std()) / 20000**0.5


def test_their_gradients_are_added_before_a_step() -> None:
    view = fresh(use_entropy=True)
    torch.manual_seed(0)
    loss(view).backward()
    found = methods(view)
    expected = []
    for method in found:
        v, c = (p.detach().clone().requires_grad_() for p in (method.v, method.c))
        (method.regularisers(v, c) / len(found)).backward()
        expected += [p.detach() - 0.1 * (p.grad + own.grad) for p, own in ((method.v, v), (method.c, c))]
    torch.optim.SGD(view.parameters(), lr=0.1).step()
    for value, now in zip(expected, [p for m in found for p in (m.v, m.c)], strict=True):
        assert far(now, value) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same(reentrant: bool) -> None:
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        view = fresh()
        if again:
            recompute(view, reentrant)
        torch.manual_seed(1)
        loss(view).backward()
        gradients.append([p.grad.clone() for p in view.get_adapter("default").parameters()])
    for one, other in zip(*gradients, strict=True):
        assert float(one.abs().max()) > 0
        assert far(one, other) < 1e-6


def test_options() -> None:
    assert LoraConfig(monteclora_config={}).monteclora_config == MontecloraConfig()
    for options, why in (
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"dirichlet_prior": 0.0}, "dirichlet_prior=0.0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=why):
            LoraConfig(monteclora_config=options)
    with pytest.raises(ValueError, match="MONTECLORA has a start of its own"):
        LoraConfig(monteclora_config={}, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="DORA and MONTECLORA cannot be one adapter"):
        LoraConfig(monteclora_config={}, use_dora=True)


def test_training_goes_on_from_a_folder(tmp_path: Path) -> None:
    view = fresh()
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    outputs = []
    for model in (view, again):
        torch.manual_seed(3)
        outputs.append(logits(model))
    assert torch.equal(*outputs)
