"""Comparisons: plain runs under equal budgets, rates chosen by rows that are not scored; killed, they go on."""

import glob
import io
import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import killing
from coadapt import PeftModel
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.tuning.compare import compare
from coadapt.tuning.outcome import Compared, plain, tell
from coadapt.tuning.plan import Budget, CompareConfig

SMALL = {"use_cpu": True, "r": 2, "per_device_train_batch_size": 4, "num_virtual_tokens": 3}
COSTS = ("seconds_per_step", "peak_bytes", "latency", "base_latency")


def config(base: str, rows: str, out: Path, **other: Any) -> CompareConfig:
    values = {"model": base, "data": rows, "methods": "lora,prompt", "budget": "4", "seeds": 2, "rates": 3, "out": out}
    return CompareConfig.read({**values, **SMALL, **other})


@pytest.fixture(scope="module")
def done(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return compare(config(base, rows, tmp_path_factory.mktemp("compared") / "out"), Console(quiet=True))


def run_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "run.yaml").read_text())


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def trials(out: Path, name: str) -> list[Path]:
    return sorted((out / "trials" / name).iterdir())


def parts(out: Path) -> dict[str, list[dict[str, str]]]:
    names = ("train", "validation", "held-out")
    files = {name: str(out / "data" / f"{name}.parquet") for name in names}
    return {name: list(load_dataset("parquet", data_files=file, split="train")) for name, file in files.items()}


def test_the_parts_are_disjoint_and_all_of_the_rows(done: Compared, rows: str) -> None:
    found = [tuple(sorted(row.items())) for part in parts(done.config.out).values() for row in part]
    expected = [tuple(sorted(json.loads(line).items())) for line in Path(rows).read_text().splitlines()]
    assert sorted(found) == sorted(expected)
    assert [len(part) for part in parts(done.config.out).values()] == [22, 2, 6]


def test_everybody_has_the_same_rows_steps_and_number_of_rates(done: Compared) -> None:
    out = done.config.out
    for name in ("lora", "prompt"):
        runs = [run_of(place) for place in trials(out, name)]
        assert {(run["data"], run["eval_data"], run["max_steps"]) for run in runs} == {
            (str(out / "data" / "train.parquet"), str(out / "data" / "validation.parquet"), 4)
        }
        assert sorted(run["seed"] for run in runs) == [42, 42, 42, 43, 44]
    lora, prompt = (run_of(trials(out, name)[0])["adapters"]["default"]["learning_rate"] for name in ("lora", "prompt"))
    assert (lora, prompt) == (pytest.approx(3e-3 / 3), pytest.approx(0.1 / 3))


def test_the_rate_with_the_lowest_validation_loss_is_kept_and_nothing_was_scored_before(done: Compared) -> None:
    for entrant in done.entrants:
        tried = {
            float(place.name.removeprefix("rate-")): result_of(place)
            for place in trials(done.config.out, entrant.name)
            if "seed" not in place.name
        }
        assert len(tried) == 3
        assert all(one["values"] is None for one in tried.values())
        best = min(tried, key=lambda factor: tried[factor]["validation_loss"])
        assert entrant.chosen == pytest.approx(best, rel=1e-2)
        assert {place.name for place in trials(done.config.out, entrant.name) if "seed" in place.name} == {
            f"rate-{best:.3g}-seed-{seed}" for seed in (43, 44)
        }


def test_a_trial_is_the_run_that_its_settings_describe(done: Compared, tmp_path: Path) -> None:
    place = done.config.out / "trials" / "prompt" / f"rate-{done.entrant('prompt').chosen:.3g}-seed-43"
    again = train(RunConfig(**{**run_of(place), "output_dir": str(tmp_path / "again")}), Console(quiet=True))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (place, again.folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_scores_are_those_of_the_saved_adapters_on_the_held_out_rows(done: Compared, base: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    for name in ("lora", "prompt"):
        entrant = done.entrant(name)
        for seed, result in entrant.repeats.items():
            place = done.config.out / "trials" / name / f"rate-{entrant.chosen:.3g}-seed-{seed}"
            view: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place).eval()
            losses = []
            for row in parts(done.config.out)["held-out"]:
                asked = tokenizer(row["prompt"])["input_ids"]
                answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
                with torch.no_grad():
                    logits = view(input_ids=torch.tensor([[*asked, *answer]])).logits[0].log_softmax(-1)
                at = range(len(asked) - 1, len(asked) + len(answer) - 1)
                losses.append((-sum(float(logits[i, t]) for i, t in zip(at, answer, strict=True)), len(answer)))
            assert result.values == pytest.approx([loss / n for loss, n in losses], rel=1e-4)
            assert result.weights == [n for _, n in losses]


def test_the_report_stands_alone_and_says_what_the_table_says(done: Compared) -> None:
    page = (done.config.out / "report.html").read_text("utf-8")
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert "http" not in re.sub(r'src="data:[^"]+"', "", page)
    results = json.loads((done.config.out / "results.json").read_text("utf-8"))
    assert results == json.loads(json.dumps(plain(done)))
    best, told = done.judged
    for name, verdict in told.items():
        total = np.average(verdict_values(done, name), axis=1, weights=done.scored[name].weights).mean()
        assert verdict.score.mean == pytest.approx(total)
        assert f"{verdict.score.mean:.3f}"[:4] in page
    assert results["best_mean"] == best == min(told, key=lambda name: told[name].score.mean)
    console = Console(width=80, record=True, file=io.StringIO())
    for part in tell(done):
        console.print(part)
    assert max(map(len, console.export_text().splitlines())) <= 80


def verdict_values(done: Compared, name: str) -> Any:
    return [result.values for result in done.entrant(name).repeats.values()]


def test_costs_are_measured(done: Compared) -> None:
    lora, prompt = done.entrant("lora"), done.entrant("prompt")
    for entrant in (lora, prompt):
        for result in entrant.repeats.values():
            assert result.seconds_per_step is not None
            assert 0 < result.seconds_per_step < 5
            assert result.peak_bytes is not None
            assert result.peak_bytes > 4 * entrant.total  # the weights in fp32, at least
    assert prompt.parameters == 3 * 32
    assert lora.parameters > prompt.parameters


def test_the_same_command_makes_nothing_again_and_more_seeds_are_added(
    done: Compared, base: str, rows: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done.config.out, out)
    for file in [*out.rglob("run.yaml")]:
        file.write_text(file.read_text().replace(str(done.config.out), str(out)))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    console = Console(record=True, file=io.StringIO())
    found = compare(config(base, rows, out, seeds=3), console)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert {path: after[path] for path in before} == before
    assert sorted(path.parent.name[-7:] for path in after.keys() - before.keys()) == ["seed-45", "seed-45"]
    assert console.export_text().count("(there already)") == len(before)
    assert found.entrant("lora").repeats[43].values == done.entrant("lora").repeats[43].values


def test_other_settings_are_refused_and_nothing_is_changed(done: Compared, base: str, rows: str) -> None:
    files = {path: path.stat().st_mtime_ns for path in done.config.out.rglob("*")}
    for other, said in (
        ({"r": 4}, "r: 2 then, 4 now"),
        ({"budget": "5"}, "budget: '4' then, '5' now"),
        ({"rates": 1}, "rates: 3 then, 1 now"),
    ):
        with pytest.raises(ValueError, match="a comparison with other settings") as error:
            compare(config(base, rows, done.config.out, **other), Console(quiet=True))
        assert said in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in done.config.out.rglob("*")} == files


def test_another_candidate_under_a_name_that_has_results_is_refused(base: str, rows: str, tmp_path: Path) -> None:
    told = {"methods": "", "r": None, "num_virtual_tokens": None, "rates": 1, "seeds": 1}

    def one(r: int) -> CompareConfig:
        return config(base, rows, tmp_path / "out", candidates={"mine": {"method": "lora", "r": r}}, **told)

    compare(one(1), Console(quiet=True))
    with pytest.raises(ValueError, match="the result of a training with other settings"):
        compare(one(2), Console(quiet=True))


def test_what_cannot_work_is_refused_before_anything_is_written(base: str, rows: str, tmp_path: Path) -> None:
    for other, said in (
        ({"methods": "lora,ptompt"}, "Did you mean 'prompt'"),
        ({"methods": "lora,lora"}, "names lora twice"),
        ({"rates": 2}, "take an odd number"),
        ({"budget": "5 weeks"}, "neither a number of steps"),
        ({"budget": "4", "max_steps": 3}, "both say how long"),
        ({"num_virtual_tokens": 4, "methods": "lora,ia3"}, "num_virtual_tokens is read by none of"),
        ({"method": "lora"}, "method has no meaning here"),
        ({"seed_": 1}, "is no setting of a run"),
        ({"score": "accuracy"}, "has no meaning for causal-lm"),
        ({"score": "perplexity"}, "take score=loss"),
        ({"methods": "bitfit", "num_virtual_tokens": None, "r": None}, "bitfit: BitFitConfig found no usual place"),
        ({"eval_split": 0}, "needs some to score"),
    ):
        with pytest.raises(ValueError, match=said):
            compare(config(base, rows, tmp_path / "out", **other), Console(quiet=True))
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"something else than a comparison \(thesis.tex\)"):
        compare(config(base, rows, tmp_path / "full"), Console(quiet=True))


def test_a_rate_at_which_the_loss_is_no_number_counts_as_the_worst(base: str, rows: str, tmp_path: Path) -> None:
    named = {"mad": {"method": "lora", "r": 1, "learning_rate": 1e30}, "calm": {"method": "lora", "r": 2}}
    told = {"methods": "", "candidates": named, "r": None, "num_virtual_tokens": None, "rates": 1, "seeds": 1}
    found = compare(config(base, rows, tmp_path / "out", **told), Console(quiet=True))
    mad = found.entrant("mad")
    assert list(found.scored) == ["calm"]
    assert all(result.loss == math.inf for result in mad.repeats.values())
    assert any(line.startswith("mad failed with seed 43: ") for line in plain(found)["sentences"])
    assert "mad" in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.full
def test_a_budget_of_time_gives_the_steps_that_it_has_time_for(base: str, rows: str, tmp_path: Path) -> None:
    told = {"methods": "lora", "num_virtual_tokens": None, "budget": "0.2s", "rates": 1, "seeds": 1}
    found = compare(config(base, rows, tmp_path / "out", **told), Console(quiet=True))
    pace = result_of(tmp_path / "out" / "trials" / "lora" / "pace")["seconds_per_step"]
    assert found.entrants[0].steps == max(1, int(0.2 / pace)) == found.entrants[0].repeats[43].steps


def test_budgets_are_read() -> None:
    assert [Budget.read(text) for text in ("300", 300, "300 steps", "90s", "1.5m", "2h")] == [
        *[Budget(steps=300)] * 3,
        Budget(seconds=90),
        Budget(seconds=90),
        Budget(seconds=7200),
    ]


# ---- killed ----------------------------------------------------------------------------------------------------------


def comparable(out: Path) -> dict[str, Any]:
    """Results, less what depends on how busy the machine was."""
    found = {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in out.rglob("result.json")}
    return {place: {k: v for k, v in one.items() if k not in COSTS} for place, one in found.items()}


def arguments(base: str, rows: str, out: Path, how: str) -> list[str]:
    told = f"{how} --budget 4 --out {out} --use-cpu --r 2 --batch-size 4 --save-steps 1"
    return ["compare", "--model", base, "--data", rows, *told.split()]


def results(out: Path) -> list[Path]:
    """Those that are there; `Path.glob` fails where a folder goes meanwhile."""
    return [Path(file) for file in glob.glob(f"{out}/trials/*/*/result.json")]  # noqa: PTH207


def killed_at(count: int, log: Path, out: Path, *arguments: str) -> dict[Path, int]:
    """Kills a comparison once it has so many results; when they were written."""
    process = killing.start(killing.command, log, *arguments)
    end = time.monotonic() + 120
    while len(results(out)) < count:
        assert process.exitcode is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.join()
    return {path: path.stat().st_mtime_ns for path in results(out)}


def ended(log: Path, *arguments: str) -> str:
    """What a comparison said that came to its end."""
    process = killing.start(killing.command, log, *arguments)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


@pytest.mark.full
def test_a_comparison_that_is_killed_makes_no_training_again(base: str, rows: str, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    told = arguments(base, rows, out, "--methods lora --rates 1 --seeds 2")
    before = killed_at(1, log, out, *told)
    said = ended(log, *told)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert said.count("(there already)") == len(before)
    assert len(list(out.rglob("result.json"))) == 2
    assert not list(out.rglob("checkpoint-*"))
    assert (out / "report.html").is_file()


@pytest.mark.full
def test_many_kills_come_to_the_same(done: Compared, base: str, rows: str, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    told = arguments(base, rows, out, "--methods lora,prompt --rates 3 --seeds 2 --num-virtual-tokens 3")
    before: dict[Path, int] = {}
    for count in (1, 3, 4, 7):
        found = killed_at(count, log, out, *told)
        assert {path: found[path] for path in before} == before
        before = found
    ended(log, *told)
    assert comparable(out) == comparable(done.config.out)
