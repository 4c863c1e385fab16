"""Adapters that tell tasks apart, trained and asked by the command line's own functions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from coadapt.data.by_task import by_task, number_of
from coadapt.training.ask import answer
from coadapt.training.load import load
from coadapt.training.material import gather
from coadapt.training.questions import find_rows, make_questions, run_of
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.training.timetable import timetable
from tiny_run import base as base

BARE = ("prompt", "completion")
QUIET: dict[str, Any] = {"max_steps": 2, "save_strategy": "no", "use_cpu": True, "eval_on_start": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"prompt": f"{a}{sign}{b}=", "completion": f" {a + b if sign == '+' else a - b}", "sort": name, "task_ids": n}
        for n, (sign, name) in enumerate((("+", "sum"), ("-", "difference")))
        for a in range(4)
        for b in range(5)
    ]
    parts = {
        "both": rows,
        "named": [{k: v for k, v in row.items() if k != "task_ids"} for row in rows],
        **{
            n: [{k: r[k] for k in ("prompt", "completion")} for r in rows if r["sort"] == n]
            for n in ("sum", "difference")
        },
    }
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def go(base: str, out: Path, **settings: Any) -> Any:
    return train(RunConfig(**{"model": base, "output_dir": str(out), **QUIET, **settings}), Console(quiet=True))


def test_tasks_are_numbers_names_or_data_sets() -> None:
    one, other = (
        Dataset.from_dict({"task_ids": [0, 2], "n": ["b", "a"]}),
        Dataset.from_dict({"n": ["c", "a"], "x": [1, 2]}),
    )
    assert by_task({"one": one}, {"one": None})["one"].count == 3
    named = by_task({"one": one, "other": other}, {"one": "n", "other": "n"})
    assert named["one"].names == named["other"].names == ("a", "b", "c")
    assert [named["other"].of(row) for row in other] == [2, 0]  # type: ignore[arg-type]
    each = by_task({"x": other, "y": other}, {"x": None, "y": None})
    assert [(tasks.number, tasks.names) for tasks in each.values()] == [(0, ("x", "y")), (1, ("x", "y"))]
    assert by_task({"x": other}, {"x": None}) == {}
    with pytest.raises(ValueError, match="other: no column says which task a row is of, as in one"):
        by_task({"one": one, "other": other}, {"one": None, "other": None})
    with pytest.raises(ValueError, match=r"no column 'm'.*there are n, x"):
        by_task({"other": other}, {"other": "m"})
    with pytest.raises(ValueError, match=r"1\.5 is neither"):
        by_task({"f": Dataset.from_dict({"task_ids": [1.5]})}, {"f": None})
    with pytest.raises(ValueError, match=r"says the task 'sun'\. Did you mean 'sum'"):
        number_of("sun", ("difference", "sum"), 2, "--task")
    with pytest.raises(ValueError, match="whole numbers from 0 to 1"):
        number_of("2", (), 2, "--task")


def test_each_row_trains_its_own_task_and_is_asked_by_it(base: str, files: dict[str, str], tmp_path: Path) -> None:
    done = go(base, tmp_path, data=files["named"], method="poly", task_column="sort", prompt_separator="")
    assert done.view.peft_config["default"].n_tasks == 2
    made = done.material.first.made
    assert not [note for note in made.notes if "not used" in note]
    for row, task in zip(made.train["input_ids"], made.train["task_ids"], strict=True):
        assert ("-" in done.material.processor.decode(row).split("=")[0]) == (task == 0)  # difference, sum
    ready = load(base, tmp_path, device=torch.device("cpu"))
    assert ready.task_names == ("difference", "sum")
    view: Any = ready.model
    for part in view.get_adapter("default").parts:  # so that tasks differ visibly
        part.method.B.data.normal_()
        part.method.Z.data.copy_(9 * torch.eye(2).repeat(1, 4)[:, : part.method.Z.shape[1]] - 4)
    assert answer(ready, "1+1=", task="sum", max_new_tokens=6) != answer(
        ready, "1+1=", task="difference", max_new_tokens=6
    )
    with pytest.raises(ValueError, match=r"say which one with --task \(difference, sum\)"):
        answer(ready, "1+1=")
    run = run_of(tmp_path)
    questions = make_questions(
        ready, find_rows(None, run, {}), run, {}, metrics=["loss", "exact_match"], max_new_tokens=3
    )
    exam, every = questions.exam, list(range(len(questions.exam.rows)))
    swapped = replace(exam, rows=[{**row, "task_ids": 1 - row["task_ids"]} for row in exam.rows])
    found, other = (one.sit(view, view.composition, every) for one in (exam, swapped))
    assert all(found[row].loss != other[row].loss for row in every)
    assert [found[row].answer for row in every] != [other[row].answer for row in every]


def test_each_of_several_data_sets_is_a_task(base: str, files: dict[str, str], tmp_path: Path) -> None:
    sets = {
        "sum": {"data": files["sum"], "composition": "skills"},
        "difference": {"data": files["difference"], "composition": "skills + plain"},
        "rest": {"data": files["both"], "composition": "plain"},
    }
    adapters = {"skills": {"method": "mtl_lora", "r": 2}, "plain": {"method": "lora", "r": 2}}
    done = go(base, tmp_path, datasets=sets, adapters=adapters, per_device_train_batch_size=6)
    assert done.view.peft_config["skills"].num_tasks == 2
    told = {name: part.tasks and part.tasks.number for name, part in done.material.parts.items()}
    assert told == {"sum": 0, "difference": 1, "rest": None}
    assert json.loads((tmp_path / "provenance.json").read_text())["tasks"]["names"] == ["sum", "difference"]


@pytest.mark.full
def test_a_task_router_learns_from_a_column(base: str, files: dict[str, str], tmp_path: Path) -> None:
    adapters = {"a": {"method": "lora", "r": 2}, "b": {"method": "lora", "r": 2}}
    composition = "task_router(a, b, num_tasks=2)"
    done = go(base, tmp_path, data=files["both"], adapters=adapters, composition=composition)
    assert done.material.first.tasks is not None
    assert set(done.material.first.made.train["task_ids"]) == {0, 1}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"method": "lora", "task_column": "sort"}, "task_column='sort' has no effect"),
        ({"method": "poly", "n_tasks": 1, "task_column": "sort"}, "task_column='sort' has no effect"),
        ({"method": "poly", "n_tasks": 2, "data": "sum"}, "default tells 2 tasks apart, and nothing says which rows"),
        ({"method": "poly", "task_column": "kind"}, "no column 'kind'"),
        (
            {"method": "poly", "n_tasks": 2, "task_column": "prompt"},
            "default tells 2 tasks apart, and the rows are of 40",
        ),
    ],
)
def test_what_says_nothing_is_refused(base: str, files: dict[str, str], settings: dict[str, Any], error: str) -> None:
    run = RunConfig(**{"model": base, **settings, "data": files[settings.get("data", "named")]})
    with pytest.raises(ValueError, match=error):
        gather(run, timetable(run))
