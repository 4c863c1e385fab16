"""What the form of a training means, held against what the command line reads."""

from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from coadapt.cli.train import read_settings
from coadapt.training.options import methods
from coadapt.ui import form
from coadapt.ui.form import AdapterForm

TWO = (
    AdapterForm(method="prompt_tuning", size="8", learning_rate="1e-2"),
    AdapterForm(method="lora", name="task", size="4", more="lora_dropout=0.1 target_modules=q_proj,v_proj"),
)


def test_a_form_is_the_run_that_its_file_is_on_the_command_line(tmp_path: Path) -> None:
    values = {"model": "m", "data": "d.jsonl", "max_steps": " 30 ", "composition": "prompt + 0.5*task"}
    values |= {"gradient_checkpointing": True, "use_cpu": False, "eval_data": "", "more": "lr_scheduler_type=cosine"}
    settings = form.settings(values, TWO)
    file = tmp_path / "settings.yaml"
    file.write_text(form.as_yaml(settings), "utf-8")
    run = read_settings(file, {}, ())
    assert run == form.checked(settings)
    assert run.max_steps == 30
    assert run.gradient_checkpointing
    assert run.lr_scheduler_type == "cosine"
    assert run.composition == "prompt + 0.5*task"
    assert list(run.adapters) == ["prompt", "task"]
    assert run.adapters["prompt"].options["num_virtual_tokens"] == 8
    assert run.adapters["prompt"].learning_rate == 1e-2
    assert run.adapters["task"].options["target_modules"] == ["q_proj", "v_proj"]
    assert {"eval_data", "use_cpu", "num_train_epochs"}.isdisjoint(settings)


@pytest.mark.parametrize(
    ("values", "adapter", "flags"),
    [
        ({"max_steps": "abc"}, {}, {"max_steps": "abc"}),
        ({"per_device_train_batch_size": "0"}, {}, {"per_device_train_batch_size": 0}),
        ({"more": "epochz=3"}, {}, None),
        ({"more": "bf16=true fp16=true"}, {}, {"bf16": True, "fp16": True}),
        ({"model": ""}, {}, {"model": None}),
        ({"data": ""}, {}, {"data": None}),
    ],
)
def test_what_is_wrong_is_told_in_the_words_of_the_command_line(
    values: dict[str, Any], adapter: dict[str, str], flags: dict[str, Any] | None
) -> None:
    given = {"model": "m", "data": "d.jsonl", **values}
    with pytest.raises(ValueError) as here:
        form.checked(form.settings(given, [AdapterForm(method="lora", **adapter)]))
    if flags is None:
        assert "'epochz' is no setting of a run" in str(here.value)
        return
    with pytest.raises(click.UsageError) as there:
        read_settings(None, {"model": "m", "data": "d.jsonl", "method": "lora", **flags}, ())
    assert str(here.value) == there.value.message


@pytest.mark.parametrize(
    ("adapters", "told"),
    [
        ([AdapterForm(method="lora", more="rnak=3")], "'rnak' is no setting of method lora. Did you mean 'r'?"),
        ([AdapterForm(method="lora", size="0")], "r=0"),
        ([AdapterForm(method="lora", name="a b")], "'a b' cannot name an adapter"),
        ([AdapterForm(method="lora", name="a"), AdapterForm(method="ia3", name="a")], "two are called 'a'"),
        ([AdapterForm(method="lora", more="x='y")], "a quote that does not end"),
        ([AdapterForm(method="lora", more="alone")], "'alone' is no setting: write name=value"),
    ],
)
def test_what_is_wrong_with_an_adapter_is_told(adapters: list[AdapterForm], told: str) -> None:
    with pytest.raises(ValueError) as error:
        form.checked(form.settings({"model": "m", "data": "d"}, adapters))
    assert told in str(error.value)


def test_a_composition_of_adapters_that_there_are_not_is_told() -> None:
    with pytest.raises(ValueError, match="There is no adapter 'tsak'"):
        form.checked(form.settings({"model": "m", "data": "d", "composition": "tsak"}, TWO))


def test_adapters_without_a_name_are_called_after_their_method() -> None:
    found = form.adapters([AdapterForm(method="lora"), AdapterForm(method="lora"), AdapterForm(method="prefix_tuning")])
    assert list(found) == ["lora", "lora2", "prefix"]


def test_every_method_but_routers_can_be_chosen_and_its_size_is_an_option_of_its() -> None:
    assert set(form.choices()) == set(methods()) - {"xlora"}
    for method in form.choices():
        option = form.size_option(method)
        assert option is None or option in methods()[method].names()


def test_a_run_gets_a_name_that_is_free_and_stays_in_its_folder(tmp_path: Path) -> None:
    settings = form.settings({"model": "some/base", "data": "d"}, TWO)
    assert form.run_name("", settings, tmp_path) == "base-prompt+task"
    (tmp_path / "base-prompt+task").mkdir()
    assert form.run_name("", settings, tmp_path) == "base-prompt+task-2"
    assert form.run_name(" mine ", settings, tmp_path) == "mine"
    for wrong in ("../mine", "a/b", ".hidden", "-x", "a b", "/tmp/x"):
        with pytest.raises(ValueError, match="also that of its folder"):
            form.run_name(wrong, settings, tmp_path)
    with pytest.raises(ValueError, match="is there already"):
        form.run_name("base-prompt+task", settings, tmp_path)


def test_the_file_is_plain_yaml_and_the_command_can_be_pasted(tmp_path: Path) -> None:
    settings = form.settings({"model": "m: x", "data": "d"}, TWO)
    assert yaml.safe_load(form.as_yaml(settings)) == settings
    assert form.command(Path("my runs/a")) == "coadapt train --config 'my runs/a/settings.yaml'"
