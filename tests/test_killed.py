"""Real processes, killed with SIGKILL at random moments while they save or train: nothing is lost, nothing is mixed."""

import glob
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import killing
from coadapt import PeftModel
from coadapt.demo import BASE
from coadapt.formats.files import COMPOSITION
from coadapt.training.folder import damage
from coadapt.training.log import read_log
from models import llama

SECONDS = 120
"""After so long without what it waits for, a test fails."""

# ---- saving ----------------------------------------------------------------------------------------------------------

State = tuple[str, dict[str, Tensor]]


def told(view: PeftModel) -> State:
    """Composition and tensors, those that only training needs among them."""
    tensors = {name: t for name, t in view.state_dict().items() if not name.endswith("_extra_state")}
    return repr(view.composition), tensors


def same(one: State, other: State) -> bool:
    names = one[1].keys() == other[1].keys()
    return one[0] == other[0] and names and all(torch.equal(t, other[1][name]) for name, t in one[1].items())


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not until():
        assert time.monotonic() < end


def kill_while_saving(folder: Path, kills: int, chance: random.Random) -> list[int]:
    """Which of the two states was found after each kill."""
    views = [killing.state(0), killing.state(1)]
    states, found = [told(view) for view in views], list[int]()
    names = list[set[str]]()
    for number, view in enumerate(views):
        view.save_pretrained(folder.with_name(f"whole{number}"))
        names.append(files_in(folder.with_name(f"whole{number}")))
    views[1].save_pretrained(folder)
    for kill in range(kills):
        hear, tell = killing.SERVER.Pipe(duplex=False)
        process = killing.start(killing.save_in_turn, folder, kill % 2, tell)
        hear.recv()
        if kill % 3:
            time.sleep(chance.uniform(0, 0.15))
        else:  # where files move to their places, one after another
            wait((folder / ".coadapt-written").exists)
            time.sleep(chance.uniform(0, 0.002))
        process.kill()
        process.join()
        assert process.exitcode == -9
        again = told(PeftModel.from_pretrained(llama(), folder, is_trainable=True))
        (number,) = [n for n, state in enumerate(states) if same(again, state)]
        assert {name for name in files_in(folder) if ".coadapt-writing" not in name} == names[number]
        found.append(number)
    views[0].save_pretrained(folder)
    assert files_in(folder) == names[0]
    return found


def test_one_of_two_states_is_there_whenever_the_process_is_killed(tmp_path: Path) -> None:
    assert set(kill_while_saving(tmp_path / "adapters", 7, random.Random(0))) == {0, 1}


@pytest.mark.full
def test_hundreds_of_kills_while_saving(tmp_path: Path) -> None:
    assert set(kill_while_saving(tmp_path / "adapters", 300, random.Random(1))) == {0, 1}


# ---- training --------------------------------------------------------------------------------------------------------


PLAIN = "--max-steps 7 --save-steps 2 --eval-steps 3"
"""The last step is between two checkpoints."""
EARLY = "--max-steps 30 --eval-steps 2 --early-stopping-patience 2 --learning-rate 0.5"
"""At this rate the held-out loss soon gets worse; the best adapters are kept."""


def arguments(data: Path, out: Path, how: str = PLAIN) -> list[str]:
    """Two adapters, dropout, a checkpoint every two steps."""
    plain = f"--model {BASE} --data {data} --output-dir {out} --method lora+prompt --r 2 --lora-dropout 0.2 --use-cpu"
    often = "--eval-split 0.2 --logging-steps 1 --save-total-limit 2"
    return ["train", *plain.split(), *often.split(), *how.split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    pairs = [{"prompt": f"{a}+{b}=", "completion": f" {a + b}"} for a in range(6) for b in range(5)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    return file


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    kill_while_training(data, out, iter(()))
    return out


def came_to(out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], set[str]]:
    """Weights, the figures that do not depend on the machine's speed, and the files of a run."""
    weights = {f"{name}/{k}": t for name in ("lora", "prompt") for k, t in weights_in(out / name).items()}
    changing = ("memory", "per_second", "runtime")
    log = [{k: v for k, v in line.items() if not any(word in k for word in changing)} for line in logged(out)]
    return weights, log, files_in(out)


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logged(out: Path) -> list[dict[str, Any]]:
    return read_log(out / "metrics.jsonl")


Moment = Callable[[Path, Callable[[], bool]], None]
"""Waits in a folder for the moment to kill; the second says whether the process has ended."""


def there(pattern: Path) -> set[str]:
    """What matches; `Path.glob` fails where a folder goes meanwhile."""
    return set(glob.glob(str(pattern)))  # noqa: PTH207


def at(name: str, chance: random.Random) -> Moment:
    """As soon as there is such a file, or up to 20 ms after."""

    def moment(out: Path, ended: Callable[[], bool]) -> None:
        before = there(out / name)
        wait(lambda: bool(there(out / name) - before) or ended())
        time.sleep(chance.uniform(0, 0.02))

    return moment


def after(seconds: float) -> Moment:
    return lambda out, ended: time.sleep(seconds)


def kill_while_training(
    data: Path, out: Path, moments: Iterator[Moment | int], how: str = PLAIN
) -> tuple[list[str], list[str]]:
    """Runs, kills, and resumes until the run ends by itself: what each process said, and what was broken each time.

    A number instead of a moment: the process is cut off at that touch of a checkpoint that is not whole.
    """
    said, broken = list[str](), list[str]()
    while True:
        again = ["--resume"] if (out / "run.yaml").is_file() else []
        log = out.with_name(f"log{len(said)}")
        moment = next(moments, None)
        target = (
            (killing.command_that_is_cut_off, log, out, moment) if isinstance(moment, int) else (killing.command, log)
        )
        process = killing.start(*target, *arguments(data, out, how), *again)
        if callable(moment):
            moment(out, lambda process=process: process.exitcode is not None)
            process.kill()
        process.join()
        said.append(log.read_text() if log.is_file() else "")
        assert process.exitcode in (0, -9), said[-1]
        # A run that stopped early and has written what it came to is over: to resume it is refused.
        if process.exitcode == 0 or (how == EARLY and (out / COMPOSITION).is_file()):
            return said, broken
        broken += [f"{path.name}: {damage(path)}" for path in out.glob("checkpoint-*") if damage(path)]


def equal(out: Path, unbroken: Path, less: frozenset[str] = frozenset()) -> None:
    """The same folder; of the files of the unbroken run some may be missing."""
    (weights, log, files), (expected, lines, names) = came_to(out), came_to(unbroken)
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert log == lines
    assert names - less <= files <= names


def test_a_training_that_is_killed_comes_to_the_same_end(data: Path, unbroken: Path, tmp_path: Path) -> None:
    chance, out = random.Random(0), tmp_path / "out"
    moments = [at("run.yaml", chance), at("checkpoint-*/model.safetensors", chance), at("checkpoint-4/*.pt", chance)]
    said, _ = kill_while_training(data, out, iter(moments))
    assert len(said) == 4
    assert "There is no checkpoint yet: training begins anew." in said[1]
    assert "Going on from checkpoint-" in said[3]
    equal(out, unbroken)


def test_a_training_that_finds_no_room_says_so_and_goes_on_when_there_is(
    data: Path, unbroken: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = killing.start(killing.command_without_room, log, 30_000, *arguments(data, out))
    process.join()
    assert process.exitcode == 1
    assert f"error: {out}/checkpoint-2 could not be written" in log.read_text()
    assert "make room, then go on with --resume" in log.read_text()
    assert files_in(out) == {"run.yaml", "metrics.jsonl", "process.json"}
    assert "could not be written" in (out / "process.json").read_text("utf-8")
    assert len(logged(out)) == 3
    kill_while_training(data, out, iter(()))
    equal(out, unbroken)


@pytest.mark.full
@pytest.mark.parametrize("how", [PLAIN, EARLY], ids=["plain", "early"])
def test_many_kills_while_training(data: Path, tmp_path: Path, how: str) -> None:
    chance = random.Random(1)
    names = ("run.yaml", "*.jsonl", "checkpoint-*", "checkpoint-*/*.pt", "checkpoint-*/*.json", "*.json", "lora/*")
    unbroken = tmp_path / "unbroken" / "out"
    unbroken.parent.mkdir()
    kill_while_training(data, unbroken, iter(()), how)
    for number in range(8):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        moments = [
            at(chance.choice(names), chance) if chance.random() < 0.6 else after(chance.uniform(0, 3)) for _ in range(8)
        ]
        _, broken = kill_while_training(data, out, iter([number + 1, *moments]), how)
        assert broken  # the first kill is within the writing, or the removal, of a checkpoint
        # The card comes last; a run that is over by then is not resumed for it, and `coadapt card` writes it.
        equal(out, unbroken, frozenset({"README.md"} if how == EARLY else ()))
