"""A search: candidates are runs, beside others they come to the same, and what it writes trains to what it says."""

import glob
import io
import json
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from optuna.trial import TrialState
from rich.console import Console
from safetensors.torch import load_file

import killing
from coadapt.evaluation.metrics import METRICS
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.tuning.findings import plain, tell
from coadapt.tuning.search import Search, search
from coadapt.tuning.space import SearchConfig, draw, settings_of
from coadapt.tuning.together import conduct_together, fits
from coadapt.tuning.trial import Trial, conduct

SMALL = {"use_cpu": True, "per_device_train_batch_size": 4, "budget": "4", "seed": 7}
SPACE = {"lora": {"r": [1, 2]}, "prompt": {"num_virtual_tokens": {"low": 2, "high": 4}}}


def config(base: str, rows: str, out: Path, **other: Any) -> SearchConfig:
    values = {"model": base, "data": rows, "methods": "lora,prompt", "space": SPACE, "trials": 3, "out": out}
    return SearchConfig.read({**values, **SMALL, **other})


@pytest.fixture(scope="module")
def done(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Search:
    out = tmp_path_factory.mktemp("searched") / "out"
    return search(config(base, rows, out), Console(quiet=True))


def test_a_search_trains_as_many_as_it_may_and_the_best_is_the_best(done: Search) -> None:
    assert len(done.trained) == 3
    complete = [t for t in done.trials() if t.state == TrialState.COMPLETE]
    assert done.front[0].values[0] == min(t.values[0] for t in complete)
    for trial in complete:
        result = json.loads((done.config.out / "trials" / str(trial.number) / "result.json").read_text())
        weighed = sum(v * w for v, w in zip(result["values"], result["weights"], strict=True))
        assert trial.values[0] == pytest.approx(weighed / sum(result["weights"]))
        assert len(result["values"]) == done.ground.rows["validation"]


def test_what_it_writes_trains_to_the_same_adapters(done: Search, tmp_path: Path) -> None:
    values = yaml.safe_load((done.config.out / "best.yaml").read_text())
    again = train(RunConfig(**values, output_dir=str(tmp_path / "again")), Console(quiet=True))
    place = done.config.out / "trials" / str(done.front[0].number)
    files = sorted(path.relative_to(place) for path in place.rglob("adapter_model.safetensors"))
    assert files
    for file in files:
        one, other = load_file(place / file), load_file(again.folder / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_best_is_scored_on_rows_that_no_candidate_was_judged_by(done: Search) -> None:
    assert done.held_out is not None
    assert done.held_out.values is not None
    assert len(done.held_out.values) == done.ground.rows["held-out"] == 6
    run = yaml.safe_load((done.config.out / "trials" / f"{done.front[0].number}-again" / "run.yaml").read_text())
    assert run["seed"] == 8
    judged = [
        yaml.safe_load(p.read_text()) for p in done.config.out.glob("trials/*/run.yaml") if "-" not in p.parent.name
    ]
    assert {(r["seed"], r["eval_data"]) for r in judged} == {(7, str(done.config.out / "data" / "validation.parquet"))}


def test_what_is_told_fits_and_is_what_is_written(done: Search) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for part in tell(done):
        console.print(part)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "3 candidates trained for 4 steps" in text
    assert json.loads(json.dumps(plain(done)))["best"] == done.front[0].number


def test_it_goes_on_with_more_trials_and_makes_none_again(base: str, rows: str, done: Search) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.config.out.rglob("result.json")}
    more = search(config(base, rows, done.config.out, trials=4), Console(quiet=True))
    assert len(more.trained) == 4
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    with pytest.raises(ValueError, match="holds a search with other settings"):
        search(config(base, rows, done.config.out, mixes=1), Console(quiet=True))


class Fixed:
    """Draws what it is told."""

    def __init__(self, **told: Any) -> None:
        self.told = {name.replace("__", "."): value for name, value in told.items()}

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        assert self.told[name] in choices
        return self.told[name]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        assert low <= self.told[name] <= high
        return self.told[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert low <= self.told[name] <= high
        return self.told[name]


LORA = {"lora__r": 2, "lora__target_modules": "all-linear", "gates": False}
DRAWN = [
    Fixed(mix="lora", **LORA, lora__rate=1.0),
    Fixed(mix="prompt", prompt__num_virtual_tokens=3, prompt__rate=0.5),
    Fixed(mix="lora+prompt", **LORA, lora__rate=3.0, prompt__num_virtual_tokens=4, prompt__rate=2.0),
]


def test_candidates_beside_others_come_to_what_they_come_to_alone(done: Search, tmp_path: Path) -> None:
    ground, metric = done.ground, METRICS["loss"]
    runs = {}
    for number, drawn in enumerate(DRAWN):
        settings = settings_of(draw(drawn, ground.config), ground.common, ground.rates)
        runs[f"c{number}"] = ground.run(settings)
    assert all(fits(run) for run in runs.values())
    beside = conduct_together(runs, tmp_path / "beside", metric)
    for label, run in runs.items():
        alone = conduct(Trial(run=run, place=tmp_path / label, held_out=ground.files["validation"], metric=metric))
        assert beside[label].steps == alone.steps == 4
        assert beside[label].values == pytest.approx(alone.values, rel=1e-4)
        files = sorted(
            path.relative_to(tmp_path / label) for path in (tmp_path / label).rglob("adapter_model.safetensors")
        )
        for file, name in zip(files, sorted(run.adapters), strict=True):
            one = load_file(tmp_path / label / file)
            other = load_file(tmp_path / "beside" / f"{label}_{name}" / "adapter_model.safetensors")
            assert all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-5) for key in one)


@pytest.mark.full
def test_a_search_with_candidates_side_by_side(base: str, rows: str, tmp_path: Path) -> None:
    found = search(config(base, rows, tmp_path / "out", together=3, gates=False, trials=3), Console(quiet=True))
    assert {t.user_attrs["group"] for t in found.trained} == {"0-2"}
    assert not found.config.pruned


def test_gates_roles_and_options_become_settings(done: Search) -> None:
    drawn = Fixed(
        mix="lora+prompt",
        lora__r=1,
        lora__target_modules="mlp",
        lora__rate=2.0,
        prompt__num_virtual_tokens=2,
        prompt__rate=1.0,
        gates=True,
    )
    settings = settings_of(draw(drawn, done.ground.config), done.ground.common, done.ground.rates)
    assert settings["composition"] == "learned*lora + learned*prompt"
    assert settings["adapters"]["lora"]["target_modules"] == "mlp"
    assert settings["adapters"]["lora"]["learning_rate"] == pytest.approx(6e-3)
    assert settings["adapters"]["prompt"]["learning_rate"] == pytest.approx(0.1)
    assert not fits(done.ground.run(settings))


@pytest.mark.full
def test_several_objectives_and_a_budget_of_parameters(base: str, rows: str, tmp_path: Path) -> None:
    told = {"objectives": "loss,parameters,memory,latency", "max_parameters": 300, "trials": 3, "mixes": 1}
    found = search(config(base, rows, tmp_path / "out", **told), Console(quiet=True))
    assert all(t.user_attrs["parameters"] <= 300 for t in found.trained)
    refused = [t for t in found.trials() if "refused" in t.user_attrs]
    assert all(t.user_attrs["parameters"] > 300 for t in refused)
    complete = found.trials(TrialState.COMPLETE)
    for trial in complete:
        beaten = any(
            all(o <= m for o, m in zip(other.values, trial.values, strict=True)) and other.values != trial.values
            for other in complete
        )
        assert (trial.number in [t.number for t in found.front]) == (not beaten)
        assert trial.values[1] == trial.user_attrs["parameters"]
        assert trial.values[2] > 0 < trial.values[3]
    assert len(list((tmp_path / "out").glob("best*.yaml"))) == len(found.front)


@pytest.mark.full
def test_a_training_that_is_worse_than_most_is_given_up(base: str, rows: str, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    space = {"lora": {"r": [1], "target_modules": ["all-linear"], "rate": [1.0]}}
    told = {"methods": "lora", "space": space, "budget": "8", "storage": storage, "trials": 1}
    found = search(config(base, rows, tmp_path / "out", **told), Console(quiet=True))
    assert found.config.pruned
    (first,) = found.trials()
    assert list(first.intermediate_values) == list(range(1, 9))
    for _ in range(4):  # others that were better than any training of this model can be
        better = dict.fromkeys(first.intermediate_values, 0.01)
        known = {name: value for name, value in first.user_attrs.items() if name != "seconds"}
        found.study.add_trial(optuna.create_trial(value=0.01, intermediate_values=better, user_attrs=known))
    again = search(config(base, rows, tmp_path / "out", **{**told, "trials": 2}), Console(quiet=True))
    last = again.trained[-1]
    assert last.state == TrialState.PRUNED
    assert list(last.intermediate_values) == [1]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"methods": "lora,ptompt"}, "Did you mean 'prompt'"),
        ({"space": {"ia3": {}}}, "of no method of this search"),
        ({"space": {"lora": {"rank": [1]}}}, "is no option of lora"),
        ({"space": {"lora": {"r": 4}}}, "a list of values, or a range"),
        ({"space": {"lora": {"r": {"low": 4, "high": 2}}}}, "from low up to high"),
        ({"objectives": "parameters"}, "one score"),
        ({"objectives": "loss,accuracy"}, "one score"),
        ({"objectives": "accuracy"}, "has no meaning for causal-lm"),
        ({"together": 2, "objectives": "loss,memory"}, "one candidate at a time"),
        ({"learning_rate": 1e-3}, "rates are searched"),
        ({"early_stopping_patience": 2}, "add --no-prune"),
        ({"budget": "5s"}, "each training has so many steps"),
        ({"time": "7"}, "is no time"),
        ({"storage": "nosql://here"}, "cannot be used"),
    ],
)
def test_what_cannot_work_is_refused_before_a_candidate_is_trained(
    base: str, rows: str, tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        search(config(base, rows, tmp_path / "out", **other), Console(quiet=True))
    assert not list(tmp_path.rglob("run.yaml"))


def arguments(base: str, rows: str, out: Path, trials: int, *more: str) -> list[str]:
    told = f"--methods prompt --budget 4 --trials {trials} --out {out} --use-cpu --batch-size 4 --save-steps 1"
    return ["search", "--model", base, "--data", rows, *told.split(), *more]


@pytest.mark.full
def test_a_search_that_is_killed_goes_on_with_the_trial_that_had_begun(base: str, rows: str, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = killing.start(killing.command, log, *arguments(base, rows, out, 2))
    end = time.monotonic() + 120
    while not glob.glob(f"{out}/trials/1/checkpoint-*"):  # noqa: PTH207  Path.glob fails where a folder goes
        assert process.exitcode is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.join()
    first = (out / "trials" / "0" / "result.json").stat().st_mtime_ns
    process = killing.start(killing.command, log, *arguments(base, rows, out, 2))
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert (out / "trials" / "0" / "result.json").stat().st_mtime_ns == first
    study = optuna.load_study(study_name="coadapt", storage=f"sqlite:///{out / 'study.db'}")
    assert [t.state.is_finished() for t in study.trials] == [True] * 2


@pytest.mark.full
def test_two_processes_work_on_one_study(base: str, rows: str, tmp_path: Path) -> None:
    journal = ["--storage", str(tmp_path / "journal.log")]
    outs = [tmp_path / "one", tmp_path / "two"]
    both = [
        killing.start(killing.command, tmp_path / f"log{n}", *arguments(base, rows, o, 6, *journal))
        for n, o in enumerate(outs)
    ]
    for process in both:
        process.join()
    assert [p.exitcode for p in both] == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    made = [{int(p.parent.name) for p in o.glob("trials/*/result.json") if p.parent.name.isdecimal()} for o in outs]
    assert not made[0] & made[1]
    assert all(made)
    assert 6 <= len(made[0] | made[1]) <= 7
