"""Every option of every configuration class of the field's library: it is here, or its refusal says what is instead."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from coadapt.config import CONFIGS
from coadapt.formats.configs import understood
from models import llama

NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 9},
    "TRAINABLE_TOKENS": {"token_indices": [1]},
    "CPT": {"cpt_token_ids": [1]},
}
SAID_OF_THEMSELVES = {"auto_mapping", "peft_version", "peft_type", "task_type"}
LIMITS = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()


def _theirs() -> dict[str, Any]:
    return {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value in CONFIGS}


def _missing(kind: str) -> list[str]:
    ours = {field.name for field in dataclasses.fields(CONFIGS[kind])} | SAID_OF_THEMSELVES
    return [field.name for field in dataclasses.fields(_theirs()[kind]) if field.name not in ours]


@pytest.mark.parametrize("kind", _theirs())
def test_it_is_here_or_the_error_says_what_is_instead(kind: str) -> None:
    for name in _missing(kind):
        told = name in CONFIGS[kind].unread or f"`{name}`" not in LIMITS
        error = f"does not read '{name}', an option of peft's: .{{9}}" if told else f"has no option '{name}'"
        needed = NEEDED.get(kind, {"num_virtual_tokens": 3} if "TUNING" in kind and kind != "LN_TUNING" else {})
        with pytest.raises(TypeError, match=error):
            CONFIGS[kind](**needed, **{name: None})


@pytest.mark.parametrize("kind", _theirs())
def test_it_has_the_same_default(kind: str) -> None:
    needed = (dataclasses.MISSING, 0 if kind == "CPT" else dataclasses.MISSING)  # told, or found: theirs has None
    theirs = {field.name: field for field in dataclasses.fields(_theirs()[kind])}
    for field in dataclasses.fields(CONFIGS[kind]):
        if field.name in SAID_OF_THEMSELVES or (other := theirs.get(field.name)) is None:
            continue
        given, wanted = (
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in (field, other)
        )
        assert given == wanted or given in needed, field.name


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("ADALORA", {"total_step": 9, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}),
        ("FROD", {"progressbar": False, "runtime_offload_base_weight": True}),
        ("OSF", {"target_svd_config": {"q_proj": 3}}),
        ("PVERA", {"generator_seed": 3}),
        ("PREFIX_TUNING", {"num_virtual_tokens": 3, "init_weights": "zero"}),
    ],
)
def test_what_says_nothing_for_inference_is_read_over(kind: str, fields: dict[str, Any]) -> None:
    assert understood({"peft_type": kind, **fields}, llama()).peft_type == kind


def test_what_is_left_out_of_a_file_is_told() -> None:
    with pytest.raises(ValueError, match="arrow_config: Arrow is a composition here"):
        understood({"peft_type": "LORA", "arrow_config": {"top_k": 1}}, llama())
