"""Several processes that train one run: the same adapters as one process with the whole batch, and one folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coadapt.cli.group import run
from coadapt.formats.files import WEIGHTS
from coadapt.training import folder, processes
from coadapt.training.log import read_log

LIMIT = 150
"""Seconds after which processes that wait for each other are ended."""
PROGRAM = [sys.executable, "-c", "from coadapt.cli import main; main()"]


class Together:
    """`coadapt train` in two processes, as torchrun starts them."""

    def __init__(self, arguments: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        told |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.running = [
            subprocess.Popen(
                [*PROGRAM, *arguments],
                env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in (0, 1)
        ]

    def ended(self) -> list[tuple[int, str]]:
        """Status and output of each; one that hangs makes the test fail."""
        try:
            said = [process.communicate(timeout=LIMIT)[0] for process in self.running]
        except subprocess.TimeoutExpired:
            pytest.fail(f"Two processes waited for each other for {LIMIT} seconds.")
        finally:
            for process in self.running:
                process.kill()
        return [(process.returncode, text) for process, text in zip(self.running, said, strict=True)]


def settings(base: str, rows: str, out: Path, batch: int, steps: int, *more: str) -> list[str]:
    every = {"model": base, "data": rows, "output-dir": str(out), "method": "prompt + lora", "max-steps": str(steps)}
    every |= {"per-device-train-batch-size": str(batch), "gradient-accumulation-steps": "2", "logging-steps": "1"}
    every |= {"lr-scheduler-type": "constant", "save-strategy": "steps", "save-steps": "2", "seed": "3"}
    return ["train", "--use-cpu", *(f"--{name}={value}" for name, value in every.items()), *more]


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = sorted(out.glob(f"*/{WEIGHTS}"))
    found = {f"{file.parent.name}: {name}": t for file in files for name, t in load_file(file).items()}
    assert len(files) == 2
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], within: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).norm() / other[name].norm()) < within, name


@pytest.mark.full
def test_two_processes_train_as_one_does(base: str, rows: str, tmp_path: Path) -> None:
    alone, both, parts = tmp_path / "alone", tmp_path / "both", tmp_path / "parts"
    assert run(settings(base, rows, alone, 4, 4)) == 0
    (first, told), (second, silent) = Together(settings(base, rows, both, 2, 4)).ended()
    assert (first, second) == (0, 0), told + silent
    assert silent == ""
    assert "warning" not in told.lower()
    assert f"Saved in {both}" in told
    same(weights(both), weights(alone), 1e-3)
    lines = [
        [
            (line["step"], *(line.get(n) for n in ("train/loss", "eval/loss")))
            for line in read_log(out / "metrics.jsonl")
        ]
        for out in (both, alone)
    ]
    assert [line[0] for line in lines[0]] == [line[0] for line in lines[1]]
    assert torch.tensor([v for line in lines[0] for v in line if v]).allclose(
        torch.tensor([v for line in lines[1] for v in line if v]), rtol=1e-3
    )
    files = [{p.relative_to(o) for p in o.rglob("*") if not p.name.startswith("rng_state")} for o in (both, alone)]
    assert files[0] == files[1]
    # In two parts, over a break: the same to the bit.
    for arguments in (settings(base, rows, parts, 2, 2), settings(base, rows, parts, 2, 4, "--resume")):
        (first, told), (second, silent) = Together(arguments).ended()
        assert (first, second) == (0, 0), told + silent
    same(weights(parts), weights(both), 1e-12)


@pytest.mark.full
def test_ctrl_c_in_one_process_ends_all_after_the_same_step(base: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    together = Together(settings(base, rows, out, 2, 5000))
    began = time.monotonic()
    while not any("train/loss" in line for line in read_log(out / "metrics.jsonl")):
        assert time.monotonic() - began < LIMIT
        time.sleep(0.05)
    together.running[1].send_signal(signal.SIGINT)
    (first, told), (second, silent) = together.ended()
    assert (first, second) == (1, 1), told + silent
    assert "Stopped at step" in told
    last = folder._checkpoints(out)[-1]
    assert folder.damage(last) is None
    assert len(list(last.glob("rng_state_*.pth"))) == 2


def test_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.first()
    monkeypatch.setenv("RANK", "1")
    assert not processes.first()
    assert processes.on_any(True, torch.device("cpu"))
    assert not processes.on_any(False, torch.device("cpu"))
