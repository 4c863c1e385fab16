"""Runs as they are found below a folder, and as processes of their own."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from coadapt.training.presence import PROCESS, note, present, process_of
from coadapt.ui import compared, curves, drawing, launch, runs
from coadapt.ui.form import SETTINGS

METRICS = [
    {"step": 0, "eval/loss": 4.0},
    {"step": 1, "train/loss": 3.0, "train/grad_norm/a": 0.0, "train/grad_norm/b": 0.5, "train/runtime": 1.0},
    {"step": 2, "train/loss": 2.0, "train/grad_norm/a": 0.25, "train/gate/b": 1.5, "train/peak_memory_gib": 0.5},
    {"step": 2, "warning": "The loss jumped."},
    {"step": 2, "eval/loss": 1.0, "train/runtime": 61.0},
    {"step": 3, "eval/loss": 1.5},
]


def make(folder: Path, done: bool = True, **settings: object) -> Path:
    """A folder with the files of a run."""
    folder.mkdir(parents=True)
    known = {"model": "m", "max_steps": 3, "adapters": {"a": {"method": "lora", "r": 8}, "b": {"method": "ia3"}}}
    (folder / runs.RUN).write_text(yaml.safe_dump({**known, **settings}), "utf-8")
    (folder / runs.METRICS).write_text("".join(json.dumps(line) + "\n" for line in METRICS), "utf-8")
    if done:
        (folder / "adapter_config.json").write_text("{}")
    return folder


def test_runs_are_found_the_latest_first_and_none_outside(tmp_path: Path) -> None:
    here = tmp_path / "runs"
    old, new = make(here / "old"), make(here / "study" / "trial")
    make(tmp_path / "elsewhere")
    (here / "link").symlink_to(tmp_path / "elsewhere")
    (here / "empty").mkdir()
    (old / "checkpoint-3").mkdir()
    (old / "checkpoint-3" / runs.RUN).write_text("{}")
    os.utime(old / runs.RUN, (1, 1))
    assert runs.found(here) == {"study/trial": new, "old": old}
    assert runs.named(here, "old") == old
    for name in ("link", "../elsewhere", "", "empty"):
        with pytest.raises(ValueError, match="There is no run"):
            runs.named(here, name)
    assert runs.found(tmp_path / "not there") == {}


def test_how_a_run_stands_is_read_from_its_files(tmp_path: Path) -> None:
    assert runs.standing(make(tmp_path / "done")).state == "done"
    stopped = make(tmp_path / "stopped", done=False)
    assert runs.standing(stopped).state == "stopped"
    (stopped / PROCESS).write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))  # of another process, long ago
    killed = runs.standing(stopped)
    assert (killed.state, killed.pid) == ("failed", None)
    assert "killed" in killed.said
    note(stopped, os.getpid())
    running = runs.standing(stopped)
    assert (running.state, running.pid, running.said) == ("running", os.getpid(), "Step 3 of 3.")
    (stopped / runs.LOG).write_text("$ coadapt train\nstep 7/40 · loss 1\nstep 8/40 · loss 1\n")
    assert runs.standing(stopped).said == "Step 8 of 40."
    (stopped / PROCESS).write_text("{ cut off")
    assert runs.standing(stopped).state == "stopped"


@pytest.mark.parametrize(
    ("log", "state", "said"),
    [
        ("$ a\nstep 1/2\nerror: The loss is nan.\n  two lines\n", "failed", "The loss is nan.\n  two lines"),
        ("$ a\nUsage: coadapt train\n\nError: data is missing\n", "failed", "data is missing"),
        ("$ a\nerror: old\n$ b\nerror: stopped\n", "stopped", "It was stopped before its first step."),
        ("$ a\nerror: old\n$ b\nstep 1/2\n", "failed", "It ended without a word"),
    ],
)
def test_why_a_run_has_ended_is_read_from_its_log(tmp_path: Path, log: str, state: str, said: str) -> None:
    folder = make(tmp_path / "run", done=False)
    (folder / PROCESS).write_text(json.dumps({"pid": 2**22 + 1, "started": 1.0}))
    (folder / runs.LOG).write_text(log, "utf-8")
    found = runs.standing(folder)
    assert found.state == state
    assert found.said.startswith(said)


def test_a_run_says_which_process_trains_it_and_why_it_failed(tmp_path: Path) -> None:
    with present(tmp_path):
        found = process_of(tmp_path)
        assert found == psutil.Process()
    assert not (tmp_path / PROCESS).exists()
    with pytest.raises(ValueError, match="no room"), present(tmp_path):
        raise ValueError("there is no room")
    assert process_of(tmp_path) is None
    assert runs.standing(tmp_path) == runs.Standing(state="failed", said="there is no room")
    with pytest.raises(KeyboardInterrupt), present(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_figures_become_lines(tmp_path: Path) -> None:
    log = runs.lines(make(tmp_path / "run"))
    assert curves.loss(log) == {"training": [(1, 3.0), (2, 2.0)], "held out": [(0, 4.0), (2, 1.0), (3, 1.5)]}
    assert curves.panel(log, "grad_norm") == {"a": [(2, 0.25)], "b": [(1, 0.5)]}  # 0 has no logarithm
    assert curves.panel(log, "gate") == {"b": [(2, 1.5)]}
    assert curves.memory(log) == {"peak": [(2, 0.5)]}
    several = [{"step": 1, "eval/loss": 1.0, "eval/x/loss": 0.5}]
    assert curves.loss(several)["held out: x"] == [(1, 0.5)]
    assert curves.spread({"a": [(1, 31.0)], "b": [(1, 1.0)]})
    assert not any(curves.spread({"a": [(1, most), (2, 1.0)]}) for most in (30.0, 1.0))
    assert not curves.spread({"a": [(1, 0.0), (2, 1.0)]})
    many = [(step, float(step)) for step in range(10_001)]
    assert len(curves.thinned(many)) < 2 * curves.MOST
    assert curves.thinned(many)[-1] == many[-1]


def test_a_picture_names_its_lines_and_lets_nothing_through() -> None:
    points = {"<b>x": [(1, 0.5), (2, 0.25)], "y": [(1, float("nan"))]}
    drawn = drawing.plot("a & b", points, curves.colors(points), logarithmic=True)
    assert drawn.count("<svg") == drawn.count("</svg>") == 1
    assert "&lt;b&gt;x" in drawn
    assert "<b>" not in drawn
    assert "a &amp; b" in drawn
    assert drawing.plot("nothing", {}, {}) == ""
    colors = curves.colors(["b", "gates"], ["a", "b"])
    assert colors["gates"] not in (colors["a"], colors["b"])
    assert colors["b"] == curves.colors(["b"], ["a", "b"])["b"]


def test_runs_beside_each_other(tmp_path: Path) -> None:
    one = make(tmp_path / "one", seed=1, output_dir="x")
    other = make(tmp_path / "two", done=False, seed=2, output_dir="y", adapters={"a": {"method": "lora", "r": 16}})
    cells = compared.summary("one", one).cells()
    assert cells | {"parameters": ""} == {
        "run": "one",
        "state": "done",
        "adapters": "lora + ia3",
        "parameters": "",
        "held-out loss": "1.5000",
        "best": "1.0000",
        "time": "1:01",
        "memory": "0.50 GiB",
    }
    assert compared.summary("two", other).state == "stopped"
    folders = {"one": one, "two": other}
    assert compared.differing(folders) == {
        "seed": ["1", "2"],
        "adapters.a.r": ["8", "16"],
        "adapters.b.method": ["ia3", "-"],
    }
    assert compared.curves(folders, "training") == {name: [(1, 3.0), (2, 2.0)] for name in folders}


def test_the_log_of_a_run_from_a_terminal_is_made_of_its_figures(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    assert runs.last_lines(folder, 3).splitlines() == [
        "step 2 · warning: The loss jumped.",
        "step 2 · held-out loss 1.0000",
        "step 3 · held-out loss 1.5000",
    ]
    (folder / runs.LOG).write_text("one\ntwo\n")
    assert runs.last_lines(folder, 1) == "two"


def until(what: object, seconds: float = 60.0) -> None:
    """Waits until a call gives something true."""
    assert callable(what)
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_run_is_a_process_of_its_own_whose_error_is_found(tmp_path: Path) -> None:
    folder = launch.start(tmp_path / "runs", "mine", {"model": "m", "adapters": {"a": {"method": "lora"}}})
    [child] = launch.children.values()
    assert os.getsid(child.pid) == child.pid
    assert runs.standing(folder).pid == child.pid
    with pytest.raises(ValueError, match="is there already"):
        launch.start(tmp_path / "runs", "mine", {})
    until(lambda: runs.standing(folder).state == "failed")
    launch.reap()
    assert not launch.children
    assert runs.standing(folder).said.startswith("data is missing")
    assert yaml.safe_load((folder / SETTINGS).read_text())["output_dir"] == str(folder)
    assert (folder / runs.LOG).read_text().startswith(f"$ coadapt train --config {folder / SETTINGS}\n")
    with pytest.raises(ValueError, match="does not run"):
        launch.stop(folder)
    with pytest.raises(ValueError, match="nothing to go on with"):
        launch.go_on(folder)


def test_a_run_that_is_asked_to_stop_gets_one_interrupt(tmp_path: Path) -> None:
    child = psutil.Popen(["sleep", "60"], start_new_session=True)
    note(tmp_path, child.pid)
    launch.stop(tmp_path)
    assert child.wait(10) == -signal.SIGINT
    assert process_of(tmp_path) is None
