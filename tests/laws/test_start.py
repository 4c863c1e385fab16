"""A new adapter changes nothing, where its paper has it so."""

from dataclasses import replace

import pytest
import torch

from coadapt import LoraConfig, PeftModel
from laws.setting import MAKE, config_of, far, fits, logits, pairs

NEUTRAL = [
    "adaption",
    "lora",
    "lora-all-linear",
    "lora-bias",
    "bottleneck",
    "bottleneck-pfeiffer",
    "bottleneck-parallel",
    "bitfit",
    "compacter",
    "mtl-lora",
    "invertible",
    "language",
    "prefix-decoupled",
]


@pytest.mark.parametrize("model", MAKE)
@pytest.mark.parametrize("case", NEUTRAL)
def test_starts_as_the_base(case: str, model: str) -> None:
    if not fits(case, model):
        pytest.skip("no place for it")
    base = MAKE[model]()
    before = logits(base)
    config = config_of(case, model)
    config = replace(config, init_lora_weights=True) if isinstance(config, LoraConfig) else config
    assert torch.equal(logits(PeftModel(base, config)), before)


@pairs(0, ["prompt", "prefix", "prefix-projected", "lora"])
def test_others_change_something_at_once(case: str, model: str) -> None:
    base = MAKE[model]()
    far(logits(PeftModel(base, config_of(case, model))), logits(base))


@pairs(1)
def test_seed_decides_the_start(case: str, model: str) -> None:
    """`init_seed` gives the same numbers whatever was drawn before, and draws nothing from the global generator."""
    config = replace(config_of(case, model), init_seed=5)
    torch.manual_seed(1)
    one = PeftModel(MAKE[model](), config).get_adapter("default").weight
    base = MAKE[model]()
    torch.manual_seed(2)
    expected = torch.rand(1)
    torch.manual_seed(2)
    other = PeftModel(base, config).get_adapter("default").weight
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, other)
