"""What is said of data sets and of when adapters train: each contradiction is refused, before anything is read."""

import io
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from coadapt.training.run import train
from coadapt.training.settings import RunConfig, explain
from coadapt.training.timetable import Span, timetable

LORA = {"method": "lora", "r": 2}


def run(datasets: Any = None, adapters: Any = None, **settings: Any) -> RunConfig:
    datasets = {"one": {"data": "d", "composition": "a"}, "two": {"data": "e", "composition": "b"}} | (datasets or {})
    return RunConfig(model="m", datasets=datasets, adapters=adapters or {"a": LORA, "b": LORA}, **settings)


def with_a(**options: Any) -> dict[str, Any]:
    return {"adapters": {"a": {**LORA, **options}, "b": LORA}}


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"datasets": {"one": {"data": "d", "composition": "a", "weight": 0}}}, "datasets.one.weight: Input should be gre"),
    ({"datasets": {"one": {"data": "d", "composition": "a", "weight": -1}}}, "greater than 0 (given: -1)"),
    (
        {"datasets": {"one": {"data": "d", "composition": "a", "weight": 2}}, "mixing_temperature": 2},
        "datasets.one.weight says one: give a temperature or weights, not both",
    ),
    ({"mixing_temperature": 0}, "mixing_temperature: Input should be greater than 0"),
    ({"data": "x"}, "data beside datasets: say it inside the data set that is meant"),
    ({"eval_data": "x"}, "eval_data beside datasets"),
    ({"datasets": {"one": {"data": "d"}}}, "datasets.one: it needs a composition"),
    ({"datasets": {"one": {"data": "d", "composition": "a", "wieght": 1}}}, "Did you mean 'weight'"),
    ({"datasets": {"a/b": {"data": "d", "composition": "a"}}}, "'a/b' cannot name an adapter"),
    ({"per_device_train_batch_size": 1}, "no room for 2 data sets, each of which has at least one row in each batch"),
    (with_a(start_step=5, stop_step=5), "adapters.a: stop_step=5 is not after start_step=5"),
    ({**with_a(start_step=50), "max_steps": 50}, "start_step=50 is not before the run's last step, max_steps=50"),
    ({**with_a(stop_step=60), "max_steps": 50}, "stop_step=60 has no effect: the run ends at max_steps=50"),
    (
        {**with_a(early_stopping_patience=2), "eval_strategy": "no"},
        "adapters.a: early_stopping_patience=2 counts evaluations, and eval_strategy=no makes none",
    ),
    (with_a(init_from="c"), "adapters.a: init_from='c' is no adapter of this run"),
    (with_a(init_from="a"), "init_from goes in a circle: a from a"),
    ({**with_a(early_stopping_patience=2, start_step=3), "fp16": True}, "fp16 with early stopping and start_step"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_what_is_wrong_in_the_settings_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        run(**settings)
    assert message in explain(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data is missing: What to train on"),
        ({"data": "d", "mixing_temperature": 2}, "mixing_temperature=2 has no effect on one data set"),
        ({"datasets": [{"data": "d", "composition": "default", "weight": 2}]}, "have no effect on one data set"),
        ({"datasets": [{"data": "x/d.csv", "composition": "default"}] * 2}, "datasets has 'd' twice: give each a name"),
        ({"datasets": "x"}, "datasets are names with settings, or a list of settings with `data` in each; got 'x'"),
        ({"datasets": {"a": "x"}}, "datasets.a: a data set is described by settings such as {data: FILE, composition"),
    ],
)
def test_what_is_wrong_with_one_data_set_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RunConfig(model="m", **settings)
    assert message in explain(caught.value)


def two(composition: str) -> dict[str, Any]:
    return {"two": {"data": "e", "composition": composition}}


TABLES: list[tuple[dict[str, Any], str]] = [
    ({"datasets": two("bb")}, r"datasets\.two\.composition: There is no adapter 'bb'\. Did you mean 'b'"),
    ({"composition": "a + bb"}, r"^composition: There is no adapter 'bb'"),
    ({"datasets": two("b +")}, r"'b \+' is no composition"),
    ({"datasets": two("learned*b")}, r"datasets\.two\.composition=.* has gates or routers that train"),
    ({"datasets": two("a")}, r"No data set uses the adapter 'b', so it would not be trained.*one: 'a', two: 'a'"),
    # `a` is to train from the first step, but all its rows wait for `b`, after which it is frozen.
    (
        {
            "datasets": {"one": {"data": "d", "composition": "b"}, **two("a >> b")},
            "adapters": {"a": {**LORA, "stop_step": 5}, "b": {**LORA, "start_step": 5}},
        },
        r"'a' is to train from step 0 to step 5, and to be frozen where its rows are drawn \(two: from step 5 to the "
        r"end; b trains from step 5 to the end\)\. .*give 'a' a data set of its own before",
    ),
    ({"adapters": {n: {**LORA, "start_step": 3} for n in "ab"}}, "Nothing would train from step 0 to step 3"),
    (
        {"adapters": {"a": {**LORA, "stop_step": 5}, "b": {**LORA, "start_step": 7}}},
        "Nothing would train from step 5 to step 7",
    ),
]


@pytest.mark.parametrize(("settings", "message"), TABLES)
def test_what_contradicts_itself_is_refused_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(run(**settings, output_dir=str(tmp_path / "out")), Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


def test_several_data_sets_train_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 data sets train in one process, and here are 2"):
        timetable(run())
    timetable(RunConfig(model="m", data="d"))


def test_rows_are_drawn_from_where_the_last_adapter_starts_to_where_the_last_stops() -> None:
    adapters = {"a": {**LORA, "stop_step": 5}, "b": {**LORA, "start_step": 5, "stop_step": 9}}
    table = timetable(run(two("a >> b"), adapters))
    assert table.datasets == {"one": Span(stop=5), "two": Span(start=5, stop=9)}
    assert (table.uses("two"), table.of("a")) == (["a", "b"], ["one", "two"])


def test_stopping_early_needs_rows_of_its_own_that_are_held_out(base: str, rows: str, tmp_path: Path) -> None:
    both = (("one", "a", 0), ("two", "b", 0.2))
    datasets = {name: {"data": rows, "composition": of, "eval_split": split} for name, of, split in both}
    settings = {**with_a(early_stopping_patience=2), "datasets": datasets, "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"adapters\.a: early_stopping_patience=2 watches .* eval_split=0 of 30 rows"):
        train(RunConfig(model=base, **settings), Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
