"""Configurations of peft since 0.3: every field that those versions wrote, at their defaults, is understood."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from coadapt.core.adapter import build
from coadapt.formats.configs import understood, without_start
from models import llama

FILES: Mapping[str, Mapping[str, Mapping[str, Any]]] = json.loads(
    (Path(__file__).parent / "peft_defaults.json").read_text()
)
"""Version -> method -> fields of its configuration class, with its default values."""
SIZES = {
    "target_modules": ["q_proj"],
    "num_virtual_tokens": 3,
    "num_layers": 2,
    "token_dim": 32,
    "num_attention_heads": 4,
    "num_transformer_submodules": 1,
    "encoder_hidden_size": 32,
}
OWN: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"target_modules": "self_attn", "adapter_len": 3, "adapter_layers": 1},
    "BONE": {"r": 8},
    "CPT": {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LORA": {"lora_alpha": 8, "lora_dropout": 0.0},
    "OFT": {"oft_block_size": 8, "r": 0},
    "TRAINABLE_TOKENS": {"token_indices": [3], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 4},
}
"""What has no default, or none that fits a small model."""
NOTES = {"ADALORA": "does not say how many steps", "BONE": "Bone is called MiSS now"}


def _said(version: str, method: str) -> dict[str, Any]:
    fields = FILES[version][method]
    given = {**SIZES, **OWN.get(method, {})}
    if method == "ADALORA":
        given |= {"lora_alpha": 8, "lora_dropout": 0.0}
    return {**fields, **{k: v for k, v in given.items() if k in fields}}


@pytest.mark.parametrize(("version", "method"), [(v, m) for v, methods in FILES.items() for m in methods])
def test_a_file_of_that_version_is_read(version: str, method: str) -> None:
    base, said = llama(), _said(version, method)
    if method == "OFT" and "oft_block_size" not in said:
        with pytest.raises(ValueError, match=r"before peft 0\.14"):
            understood(said, base)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = understood(said, base)
    assert [str(w.message) for w in caught if NOTES.get(method, "") not in str(w.message)] == []
    assert bool(caught) == (method in NOTES)
    kept = {"r", "num_virtual_tokens", "alpha", "lora_alpha", "target_r", "n_frequency"} & said.keys()
    kept -= {"r"} if method in ("ADALORA", "OFT") else set()
    assert all(getattr(config, name) == said[name] for name in kept)
    assert build("a", without_start(config), base, blank=True).parts


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_a_field_that_nobody_knows_passes_where_it_says_nothing(value: object) -> None:
    assert understood({**_said("0.15.2", "LORA"), "of_tomorrow": value}, llama()).peft_type == "LORA"


def test_one_that_says_something_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="of_tomorrow=3"):
        understood({**_said("0.15.2", "LORA"), "of_tomorrow": 3}, llama())
