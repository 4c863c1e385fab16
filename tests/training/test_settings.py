"""One vocabulary: what is understood, what is refused, and by which words."""

import subprocess
import sys
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, TrainingArguments

import coadapt.methods  # noqa: F401  makes the configurations known
from coadapt.config import CONFIGS
from coadapt.training.options import NOT_CHOSEN, RECOMMENDED, SMALL, method_named, methods
from coadapt.training.settings import RunConfig, explain
from coadapt.training.vocabulary import ALIASES, GONE, SettingHint, override, read_yaml


def run(**settings: Any) -> RunConfig:
    return RunConfig(**{"model": "m", "data": "d", **settings})


def refusal(**settings: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        run(**settings)
    return explain(caught.value)


def test_what_is_read_from_the_sources_is_what_the_classes_have() -> None:
    from dataclasses import fields

    real = {kind.lower(): {f.name for f in fields(config)} - NOT_CHOSEN for kind, config in CONFIGS.items()}
    forms = {name: method for name, method in methods().items() if method.fixed}
    assert {name: set(method.names()) for name, method in methods().items() if name not in forms} == real
    assert all(set(f.names()) | set(f.fixed) == real[f.kind.lower()] for f in forms.values())


def test_every_recommended_option_is_one_of_its_method() -> None:
    assert all(set(d.options) <= set(methods()[name].names()) for name, d in RECOMMENDED.items())
    assert set(RECOMMENDED) <= set(methods())


def test_one_method_is_one_adapter_with_tested_values() -> None:
    [(name, adapter)] = run().adapters.items()
    assert (name, adapter.method, adapter.learning_rate) == ("default", "lora", None)
    assert adapter.options == {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def test_options_go_to_the_methods_that_read_them() -> None:
    both = run(method="prompt + lora", r="8", num_virtual_tokens=4).adapters
    assert {name: adapter.method for name, adapter in both.items()} == {"prompt": "prompt_tuning", "lora": "lora"}
    assert (both["lora"].options["r"], both["lora"].options["lora_alpha"]) == (8, 16)
    assert both["prompt"].options["num_virtual_tokens"] == 4
    assert "r" not in both["prompt"].options


def test_a_rate_that_is_left_open_follows_the_size_of_the_base() -> None:
    both = run(method="prompt + lora")
    large = both.with_rates(SMALL).peak_rates()
    assert large == {"prompt": 5e-3, "lora": 2e-4}
    small = both.with_rates(SMALL - 1)
    assert small.peak_rates() == {name: RECOMMENDED[a.method].small for name, a in both.adapters.items()}
    assert {name: a.options for name, a in small.adapters.items()} == {n: a.options for n, a in both.adapters.items()}
    assert run(method="lora", learning_rate=7e-5).with_rates(1).peak_rates() == {"default": 7e-5}
    with pytest.raises(ValueError, match="No learning_rate is given for prompt, lora"):
        both.peak_rates()


def test_an_adapter_keeps_its_own_rate_beside_the_run_s() -> None:
    adapters = {"a": {"method": "lora", "learning_rate": "1e-3"}, "b": {"method": "lora"}}
    found = run(adapters=adapters, learning_rate="5e-5").adapters
    assert (found["a"].learning_rate, found["b"].learning_rate) == (1e-3, 5e-5)


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nadapters:\n  task: {method: lora, lora_dropout: 1e-1, r: '4'}\n", "utf-8")
    found = run(**read_yaml(file))
    assert found.learning_rate == 1e-4
    assert found.adapters["task"].options["lora_dropout"] == 0.1
    assert found.adapters["task"].options["r"] == 4


@pytest.mark.parametrize(("alias", "name"), sorted(ALIASES.items()))
def test_other_programs_names_are_taken_with_a_hint(alias: str, name: str) -> None:
    values = {"model": "m", "data": "d", "method": "lora", "r": 4, "target_modules": "q_proj", "eval_strategy": "no"}
    value = {**values, "resume": True, "dtype": "auto"}.get(name, 2)
    values.pop(name, None)
    with pytest.warns(SettingHint, match=f"{alias} is called {name} here"):
        found = RunConfig(**values, **{alias: value})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == RunConfig(**{**values, name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metod": "lora"}, "'metod' is no setting of a run. Did you mean 'method'"),
        ({"method": "bottelneck"}, "method='bottelneck' is unknown. Did you mean 'bottleneck'"),
        ({"method": "prompt", "r": 4}, "r is not read by prompt, but by"),
        ({"adapters": {"a": {"method": "lora", "rr": 1}}}, "adapters.a: 'rr' is no setting of method lora"),
        ({"adapters": {"a": {"r": 1}}}, "adapters.a: it needs a method"),
        ({"adapters": {"a/b": {"method": "lora"}}}, "'a/b' cannot name an adapter"),
        ({"adapters": {"a": {"method": "lora"}}, "r": 4}, "r beside adapters"),
        ({"method": "lora + lora"}, "names one twice"),
        ({"epochs": 1, "num_train_epochs": 2}, "num_train_epochs is given twice"),
        ({"learning_rate": "fast"}, "learning_rate: Input should be a valid number"),
        ({"learning_rate": -1}, "learning_rate: Input should be greater than 0 (given: -1)"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
        ({"eval_steps": 5, "eval_strategy": "no"}, "eval_strategy=no does not go with eval_steps=5"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "eval_strategy=no makes none: set eval_steps"),
        ({"early_stopping_patience": 2, "save_steps": 5}, "leave the first two out"),
        ({"early_stopping_patience": 0}, "greater than or equal to 1"),
        ({"early_stopping_threshold": 0.1}, "has no effect without early_stopping_patience"),
        ({"model": None}, "model is missing: The base"),
        *[({name: 1}, f"{name} is not read") for name in GONE],
    ],
)
@pytest.mark.filterwarnings("ignore::coadapt.training.vocabulary.SettingHint")
def test_what_is_wrong_is_said_with_the_setting_and_the_remedy(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(**settings)


def test_the_plain_form_builds_the_same_run() -> None:
    one = run(method="prompt + lora", r=8, composition="0.5*prompt + lora", eval_steps=7, learning_rate=1e-3)
    assert RunConfig(**one.plain()) == one


@pytest.mark.parametrize("evaluation", [{}, {"eval_strategy": "epoch"}, {"eval_steps": 7}])
def test_early_stopping_has_a_checkpoint_for_each_evaluation(evaluation: dict[str, Any]) -> None:
    one = run(early_stopping_patience=2, **evaluation)
    assert (one.save_strategy, one.save_steps) == (one.eval_strategy, one.eval_steps)
    assert one.eval_steps == evaluation.get("eval_steps")
    assert RunConfig(**one.plain()) == one


def test_overrides_reach_into_adapters() -> None:
    values: dict[str, Any] = {"adapters": {"task": {"method": "lora"}}}
    for setting in ("adapters.task.learning_rate=5e-3", "adapters.task.target_modules=[q_proj, v_proj]", "max-steps=3"):
        override(values, setting)
    found = run(**values)
    assert found.adapters["task"].learning_rate == 5e-3
    assert found.adapters["task"].options["target_modules"] == ["q_proj", "v_proj"]
    assert found.max_steps == 3
    for wrong in ("max_steps", "=3"):
        with pytest.raises(ValueError, match="write name=value"):
            override({}, wrong)
    with pytest.raises(ValueError, match="model='m' is one value"):
        override({"model": "m"}, "model.name=x")


def test_names_with_commas_are_lists_where_a_list_is_meant() -> None:
    found = run(r=4, target_modules="q_proj, v_proj", exclude_modules="lm_head").adapters["default"].options
    assert (found["target_modules"], found["exclude_modules"]) == (["q_proj", "v_proj"], ["lm_head"])
    for text in ("all-linear", r".*\.q_proj"):
        assert run(target_modules=text).adapters["default"].options["target_modules"] == text
    assert run(method="cpt", cpt_token_ids="5, 9,12").adapters["default"].options["cpt_token_ids"] == [5, 9, 12]


def test_names_are_those_of_transformers_where_it_has_one() -> None:
    ours = {
        "model",
        "revision",
        "dtype",
        "task",
        "data",
        "dataset_config",
        "eval_data",
        "eval_split",
        "prompt_separator",
    }
    ours |= {f"{role}_column" for role in ("text", "prompt", "completion", "label", "image", "task")} | {
        "completion_only_loss",
        "max_length",
    }
    ours |= {"method", "adapters", "composition", "gates_learning_rate", "overwrite_output_dir", "resume", "verify"}
    ours |= {"datasets", "mixing_temperature", "device_map", "max_memory"}
    ours |= set(signature(EarlyStoppingCallback).parameters) | set(signature(BitsAndBytesConfig).parameters)
    assert set(RunConfig.model_fields) - ours <= set(TrainingArguments.__dataclass_fields__)
    assert all(field.description for field in RunConfig.model_fields.values())


@pytest.mark.parametrize(
    ("word", "name"), [("LoRA", "lora"), ("prompt", "prompt_tuning"), ("prefix-tuning", "prefix_tuning")]
)
def test_methods_by_their_usual_names(word: str, name: str) -> None:
    assert method_named(word).name == name


def test_settings_are_read_without_torch() -> None:
    code = "import sys, coadapt.training.settings as s; s.RunConfig(model='m', data='d'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
