"""The effective rank from factors is that of the whole change, by its singular values."""

import math
from typing import Any

import pytest
import torch

import models
from coadapt import (
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from coadapt.core.layer import Layer
from coadapt.training import ranks
from coadapt.training.ranks import effective_rank, rank_of, singular_values


def naive(matrix: torch.Tensor) -> float:
    """From the singular values of all of it, sum by sum."""
    values = torch.linalg.svdvals(matrix.detach().double().flatten(1)).tolist()
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


def filled(model: PeftModel, name: str = "default") -> Any:
    """The adapter, all its parameters random."""
    torch.manual_seed(1)
    for parameter in model.get_adapter(name).parameters():
        torch.nn.init.normal_(parameter.data)
    return model.get_adapter(name)


def mean(found: list[float]) -> Any:
    assert found
    return pytest.approx(sum(found) / len(found), rel=1e-5)


@pytest.mark.parametrize("sizes", [(9, 30, 20), (3, 500, 8), (20, 4, 50)])
def test_singular_values_without_the_matrix(sizes: tuple[int, ...]) -> None:
    r, o, i = sizes
    torch.manual_seed(0)
    b, a = torch.randn(o, r), torch.randn(r, i)
    b[:, -1] = b[:, 0]  # of lower rank than it has columns
    exact = torch.linalg.svdvals(b.double() @ a.double())[:r].flip(0)
    found = singular_values((b, a))
    assert torch.allclose(found[-len(exact) :], exact, atol=1e-6 * float(exact[-1]))
    assert torch.allclose(singular_values((b, None)), torch.linalg.svdvals(b.double()).flip(0), atol=1e-6)


def test_it_counts_directions() -> None:
    assert float(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))) == pytest.approx(3)
    assert float(effective_rank(torch.tensor([7.0, 0.0]))) == pytest.approx(1)
    assert float(effective_rank(torch.tensor([1.0, 1e-9]))) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (models.llama, LoraConfig(r=5, target_modules="all-linear")),
        (models.llama, LoraConfig(r=3, target_modules=["embed_tokens", "up_proj"], rank_pattern={"up_proj": 7})),
        (models.gpt2, LoraConfig(r=4, target_modules=["c_attn"])),
        (models.whisper, LoraConfig(r=4, target_modules=["conv1", "conv2"])),
    ],
)
def test_of_a_low_rank_method_it_is_that_of_the_change_of_the_weight(make: Any, config: LoraConfig) -> None:
    adapter = filled(get_peft_model(make(), config))
    whole = []
    for part in adapter.parts:
        weight = Layer(part.place.module, part.place.path).weight().double()
        whole.append(naive(part.method.double().merge(weight) - weight))
    assert len(set(whole)) > 1
    assert rank_of(adapter) == mean(whole)
    assert max(whole) <= 7 + 1e-6


def test_of_experts_each_counts_by_itself() -> None:
    config = LoraConfig(r=3, target_parameters=["mlp.experts.down_proj"])
    adapter = filled(get_peft_model(models.mixtral(), config))
    factors = [(m.A, m.B) for m in (part.method for part in adapter.parts)]
    assert rank_of(adapter) == mean([naive(b[e] @ a[e]) for a, b in factors for e in range(len(a))])


def test_of_dora_it_is_that_of_the_product_in_it() -> None:
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True)
    adapter = filled(get_peft_model(models.llama(), config))
    assert rank_of(adapter) == mean([naive(p.method.change.B @ p.method.change.A) for p in adapter.parts])


def test_of_what_changes_no_weight_it_is_that_of_its_matrices() -> None:
    model = get_peft_model(models.llama(), BottleneckConfig(bottleneck_size=6))
    bottleneck = filled(model)
    assert rank_of(bottleneck) == mean([naive(p.method.up.weight @ p.method.down.weight) for p in bottleneck.parts])
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=5))
    [prompt] = filled(model, "prompt").parts
    assert rank_of(model.get_adapter("prompt")) == mean([naive(prompt.method.P)])
    model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=4))
    prefix = filled(model, "prefix")
    assert rank_of(prefix) == mean([naive(p.method.P.flatten(1)) for p in prefix.parts])


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(),
        LNTuningConfig(),
        PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_dropout=0.5),
        LoraConfig(r=2),
    ],
)
def test_vectors_networks_and_what_is_0_have_none_and_nothing_is_drawn(config: Any) -> None:
    adapter = get_peft_model(models.llama(), config).get_adapter("default")
    before = torch.get_rng_state()
    assert rank_of(adapter) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_the_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(ranks, "singular_values", lambda factors: counted.append(factors) or singular_values(factors))
    model = get_peft_model(models.llama(num_hidden_layers=6), LoraConfig(r=2, target_modules="all-linear"))
    adapter = filled(model)
    assert len(adapter.parts) == 42
    first = rank_of(adapter)
    assert len(counted) == ranks.SITES
    assert len({b.shape for b, _ in counted}) == 3  # not the same layer of every block
    assert rank_of(adapter) == first
    counted.clear()
    rank_of(adapter, sites=5)
    assert len(counted) == 5
    model.add_adapter("wide", LoraConfig(r=ranks.WIDE + 1, target_modules="all-linear"))
    wide = filled(model, "wide")
    counted.clear()
    rank_of(wide)
    assert len(counted) == ranks.FEW
