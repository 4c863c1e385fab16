"""A new adapter changes nothing, where its paper has it so."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from coadapt import LoraConfig, PeftModel
from coadapt.config import PeftConfig
from laws.setting import MAKE, close, config_of, far, fits, logits, pairs

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
    "bat",
    "boft",
    "boft-butterfly",
    "coft",
    "delora",
    "glora",
    "glora-vectors",
    "hira",
    "miss",
    "miss-mini",
    "oft",
    "oft-blocks",
    "peanut",
    "psoft",
    "road",
    "road-1",
]
NEARLY = ["deft", "hra"]
"""What is taken away and put back, or mirrored twice: to rounding."""


def at_start(case: str, model: str) -> PeftConfig:
    config: Any = config_of(case, model)
    if isinstance(config, LoraConfig):
        return replace(config, init_lora_weights=True)
    if case == "hra":
        config = replace(config, r=4)  # in pairs
    return replace(config, init_weights=True) if getattr(config, "init_weights", True) is False else config


@pytest.mark.parametrize("model", MAKE)
@pytest.mark.parametrize("case", NEUTRAL)
def test_starts_as_the_base(case: str, model: str) -> None:
    if not fits(case, model):
        pytest.skip("no place for it")
    base = MAKE[model]()
    before = logits(base)
    assert torch.equal(logits(PeftModel(base, at_start(case, model))), before)


@pairs(2, NEARLY)
def test_starts_as_the_base_to_rounding(case: str, model: str) -> None:
    base = MAKE[model]()
    close(logits(PeftModel(base, at_start(case, model))), logits(base), 1e-5)


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
