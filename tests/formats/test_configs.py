"""adapter_config.json: what every reader needs, and what others write."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coadapt import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from models import bert, gpt2, llama, logits, plain, stir, t5


def written(base: Any, config: PeftConfig, folder: Path, **options: Any) -> dict[str, Any]:
    view = get_peft_model(base, config, **options)
    stir(view.adapters)
    view.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    said = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in said.items() if v != "absent"}))


def test_the_least_that_every_reader_needs(tmp_path: Path) -> None:
    said = written(llama(), LoraConfig(r=16, lora_alpha=32.0, task_type="CAUSAL_LM"), tmp_path)
    least = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "use_qalora": False,
        "qalora_group_size": 16,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
        "revision": None,
        "peft_version": "0.21.2",
    }
    assert said == least
    assert type(said["lora_alpha"]) is int


@pytest.mark.parametrize(
    ("options", "targets"),
    [
        ({"target_modules": ["self_attn.q_proj", "up_proj"]}, ["self_attn.q_proj", "up_proj"]),
        (
            {"target_modules": "all-linear"},
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        ),
        ({"target_modules": r".*\.(q|k)_proj"}, ["k_proj", "q_proj"]),
        (
            {"target_modules": r".*layers\.1.*\.q_proj|.*v_proj"},
            [f"model.layers.{n}.self_attn.{p}" for n, p in ((0, "v_proj"), (1, "q_proj"), (1, "v_proj"))],
        ),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, None),
        ({"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]}, None),
    ],
)
def test_targets_are_a_list_of_real_names(options: dict[str, Any], targets: list[str] | None, tmp_path: Path) -> None:
    view = get_peft_model(llama(), LoraConfig(r=2, **options))
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(said["target_modules"], list)
    assert targets is None or said["target_modules"] == targets
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(view.eval()).detach(), logits(again))
    asked = json.loads((tmp_path / "provenance.json").read_text()).get("asked_target_modules")
    assert asked == (options["target_modules"] if isinstance(options["target_modules"], str) else None)


def test_the_first_of_several_matching_patterns_stays_the_first(tmp_path: Path) -> None:
    patterns = {"v_proj": 3, "layers.1.self_attn.v_proj": 5, "q_proj": 2}
    said = written(llama(), LoraConfig(rank_pattern=patterns), tmp_path)
    assert list(said["rank_pattern"]) == list(patterns)
    PeftModel.from_pretrained(llama(), tmp_path)


def test_gpt2_stores_its_weights_transposed(tmp_path: Path) -> None:
    assert written(gpt2(), LoraConfig(), tmp_path)["fan_in_fan_out"] is True
    assert PeftModel.from_pretrained(gpt2(), tmp_path).peft_config["default"].fan_in_fan_out is False


def test_the_adapters_name_is_never_written(tmp_path: Path) -> None:
    view = get_peft_model(llama(), LoraConfig(adapter_name="mine"))
    view.save_pretrained(tmp_path)
    assert "adapter_name" not in (tmp_path / "mine" / "adapter_config.json").read_text()
    assert PeftModel.from_pretrained(llama(), tmp_path / "mine").active_adapters == ["default"]


# ---- folders of other programs ---------------------------------------------------------------------------------------

OLD = {
    "auto_mapping": None,
    "enable_lora": None,
    "merge_weights": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "trainable_token_indices": None,
    "eva_config": None,
    "modules_to_save": [],
    "use_dora": False,
    "peft_version": "absent",
}


def test_unknown_fields_at_their_default_pass(tmp_path: Path) -> None:
    view = get_peft_model(llama(), LoraConfig(r=2))
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    rewrite(tmp_path, **OLD, use_rslora="absent", rank_pattern="absent", revision="absent")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(view.eval()).detach())


@pytest.mark.parametrize(
    ("field", "value"),
    [("megatron_config", {"a": 1}), ("megatron_core", "other"), ("something_new", 3)],
)
def test_others_are_an_error_that_names_them(field: str, value: Any, tmp_path: Path) -> None:
    written(llama(), LoraConfig(r=2), tmp_path)
    rewrite(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"{field}="):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_an_unknown_method_is_named(tmp_path: Path) -> None:
    written(llama(), LoraConfig(r=2), tmp_path)
    rewrite(tmp_path, peft_type="LORAX")
    with pytest.raises(ValueError, match=r"LORAX.*Did you mean 'LORA'"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_names_of_heads_that_the_model_does_not_have_pass(tmp_path: Path) -> None:
    """The field writes every name that a head may have."""
    written(bert(), LoraConfig(r=2, task_type="SEQ_CLS"), tmp_path)
    rewrite(tmp_path, modules_to_save=["classifier", "score", "classifier"])
    assert PeftModel.from_pretrained(bert(), tmp_path).peft_config["default"].modules_to_save == ["classifier"]
    rewrite(tmp_path, modules_to_save=["classifier", "poolr"])
    with pytest.raises(ValueError, match="poolr"):
        PeftModel.from_pretrained(bert(), tmp_path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_a_damaged_configuration(text: str, tmp_path: Path) -> None:
    written(llama(), LoraConfig(r=2), tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(llama(), tmp_path)


# ---- loading -----------------------------------------------------------------------------------------------------


def test_loading_starts_nothing(tmp_path: Path) -> None:
    """No tokenizer is asked for the text that a prompt once started from, and no random number is drawn."""
    written(llama(), PromptTuningConfig(num_virtual_tokens=2), tmp_path)
    rewrite(tmp_path, prompt_tuning_init="TEXT", prompt_tuning_init_text="do it", tokenizer_name_or_path="nowhere/x")
    base, before = llama(), torch.get_rng_state()
    view = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    config: Any = view.peft_config["default"]
    assert config.prompt_tuning_init_text == "do it" and config.init_seed is None


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (llama, LoraConfig(r=2, lora_alpha=0.5, lora_dropout=0.1, alpha_pattern={"q_proj": 4.0})),
        (llama, PromptTuningConfig(num_virtual_tokens=2, output_virtual_tokens=True)),
        (llama, PrefixTuningConfig(num_virtual_tokens=2, position_offset=0)),
        (t5, PrefixTuningConfig(num_virtual_tokens=2, prefix_sites=["encoder", "cross"])),
        (t5, PromptTuningConfig(num_virtual_tokens=2, prompt_sites=["encoder", "decoder"])),
        (plain, LoraConfig(r=2, target_modules=["first"])),
    ],
)
def test_the_configuration_comes_back(base: Any, config: PeftConfig, tmp_path: Path) -> None:
    """But for what was left out, which the file tells as it was found."""
    view = get_peft_model(base(), config)
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).peft_config["default"]
    left_out = [k for k, v in view.peft_config["default"].to_dict().items() if v is None]
    expected = {k: v for k, v in view.peft_config["default"].to_dict().items() if k not in left_out}
    assert {k: v for k, v in again.to_dict().items() if k not in left_out} == expected


def test_a_configuration_given_in_place_of_the_folders(tmp_path: Path) -> None:
    written(llama(), LoraConfig(r=2, lora_alpha=2), tmp_path)
    other = LoraConfig(r=2, lora_alpha=4)
    view = PeftModel.from_pretrained(llama(), tmp_path, config=other)
    assert view.peft_config["default"].lora_alpha == 4
    base, one = logits(llama()), PeftModel.from_pretrained(llama(), tmp_path)
    assert not torch.allclose(logits(view), logits(one)) and not torch.allclose(logits(view), base)


def test_provenance(tmp_path: Path) -> None:
    written(llama(), LoraConfig(r=2), tmp_path)
    file = tmp_path / "provenance.json"
    said = json.loads(file.read_text())
    assert said["versions"]["torch"] == torch.__version__
    assert all(said["versions"][n] for n in ("coadapt", "transformers", "python"))
    assert len(said["base"]["fingerprint"]) == 33
    file.write_text(json.dumps({**said, "data": {"sha256": "ab"}, "asked_target_modules": "all-linear"}))
    PeftModel.from_pretrained(llama(), tmp_path).save_pretrained(tmp_path)
    again = json.loads(file.read_text())
    assert again["data"] == {"sha256": "ab"} and again["base"] == said["base"] and "asked_target_modules" not in again


def test_another_base_is_warned_of_with_both_fingerprints(tmp_path: Path) -> None:
    written(llama(), LoraConfig(r=2), tmp_path)
    theirs = json.loads((tmp_path / "provenance.json").read_text())["base"]["fingerprint"]
    other = llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.warns(UserWarning, match=rf"other weights.*{theirs}"):
        PeftModel.from_pretrained(other, tmp_path)
