"""`coadapt train` in several processes, forked from a server that has imported everything; what each of them saw."""

import os
import signal
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import killing
from coadapt.data.tokens import IGNORED
from coadapt.formats.files import WEIGHTS
from coadapt.training import run
from coadapt.training.joint import JointTrainer
from coadapt.training.log import read_log
from coadapt.training.record import Interrupt

LIMIT = 90
"""Seconds after which processes that wait for each other are ended, and the test fails."""


@dataclass(frozen=True)
class Told:
    """What one process came to."""

    code: int
    said: str
    state: dict[str, Tensor] | None
    """Of its view, at the end of the training."""
    rows: list[tuple[int, list[list[int]]]]
    """Step and tokens of each batch that it trained on."""
    held: tuple[int, int]
    """Numbers of the base's weights that lie here, and that there are."""


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """As torchrun sets it."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in local.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train(place: Path, told: Mapping[str, str], trouble: Mapping[str, Any], *args: str) -> None:
    """One process: `coadapt train`, with what it saw written to `place`, and with what is to go wrong in it."""
    os.environ.update(told)
    found: dict[str, Any] = {"rows": [], "state": None, "held": (0, 0)}
    step, finish, end = JointTrainer.training_step, run.finish, Interrupt.on_step_end

    def training_step(self: Any, model: Any, inputs: Any, count: Any = None) -> Tensor:
        trained = inputs["labels"].ne(IGNORED).any(-1)  # others fill up the last batches of a pass
        found["rows"].append((self.state.global_step, inputs["input_ids"][trained].tolist()))
        return step(self, model, inputs, count)

    def finished(settings: Any, trainer: Any, view: Any, *rest: Any) -> Any:
        found["state"] = {n: t.clone() for n, t in view.state_dict().items() if not n.endswith("_extra_state")}
        own = list(view.get_base_model().parameters())
        local = [p.to_local() if isinstance(p, DTensor) else p for p in own]
        found["held"] = sum(p.numel() for p in local), sum(p.numel() for p in own)
        torch.save(found, place)
        return finish(settings, trainer, view, *rest)

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.asked |= state.global_step == trouble.get("stop")
        if state.global_step == trouble.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == trouble.get("fail"):
            raise ValueError("the disk is on fire")
        end(self, args, state, control, **more)

    JointTrainer.training_step, run.finish, Interrupt.on_step_end = training_step, finished, on_step_end  # type: ignore[method-assign,assignment]
    killing.command(place.with_suffix(".log"), *args)


class Together:
    """A run in several processes; `trouble` is of the last of them: {"stop" | "kill" | "fail": after which step}."""

    def __init__(
        self,
        folder: Path,
        world: int,
        args: Sequence[str],
        trouble: Mapping[str, Any] | None = None,
        **more: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.places = [folder / f"{rank}.pt" for rank in range(world)]
        for place in self.places:
            place.unlink(missing_ok=True)
        self.running: list[BaseProcess] = []
        for rank, place in enumerate(self.places):
            told = {} if world == 1 else environment(rank, world, port)
            wrong = (trouble or {}) if rank == world - 1 else {}
            self.running.append(killing.start(train, place, {**told, **more}, wrong, *args))

    def ended(self) -> list[Told]:
        """What each came to; one that hangs makes the test fail."""
        try:
            for process in self.running:
                process.join(LIMIT)
            if any(process.exitcode is None for process in self.running):
                pytest.fail(f"Processes waited for each other for {LIMIT} seconds.")
        finally:
            for process in self.running:
                process.kill()
                process.join()
        return [self._told(process, place) for process, place in zip(self.running, self.places, strict=True)]

    def _told(self, process: BaseProcess, place: Path) -> Told:
        found = torch.load(place) if place.is_file() else {"state": None, "rows": [], "held": (0, 0)}
        log = place.with_suffix(".log")
        assert process.exitcode is not None
        return Told(code=process.exitcode, said=log.read_text("utf-8") if log.is_file() else "", **found)


# ---- one run, and what it came to ----------------------------------------------------------------------------------

WITHIN = 1e-4
"""Of a tensor's length: the order of sums differs with the number of processes."""


def settings(base: str, rows: str, out: Path, batch: int, accumulation: int, *more: str) -> list[str]:
    """Two passes over 30 rows, 8 in each step, with a rate that rises and falls; no dropout."""
    every = {"model": base, "data": rows, "output-dir": str(out), "method": "prompt + lora", "num-train-epochs": "2"}
    every |= {"per-device-train-batch-size": str(batch), "gradient-accumulation-steps": str(accumulation)}
    every |= {"logging-steps": "1", "save-steps": "2", "seed": "3", "eval-split": "0", "warmup-steps": "2"}
    cpu = ["--use-cpu"] if torch.accelerator.is_available() else []  # as most would not say it where there is no other
    return ["train", *cpu, *(f"--{name}={value}" for name, value in every.items()), *more]


def weights(out: Path) -> dict[str, Tensor]:
    return {f"{f.parent.name}: {n}": t for f in sorted(out.glob(f"*/{WEIGHTS}")) for n, t in load_file(f).items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, as a share of its length."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in one)


def equal(told: list[Told]) -> None:
    """Every process has the same adapters, to the bit."""
    states = [one.state for one in told]
    assert states[0]
    for state in states:
        assert state is not None
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def drawn(*parts: list[Told]) -> Counter[tuple[int, ...]]:
    """How often each row was trained on, by its tokens; padding left out."""
    found: Counter[tuple[int, ...]] = Counter()
    for told in parts:
        for one in told:
            found.update(tuple(t for t in row if t) for _, batch in one.rows for row in batch)
    return found


def curve(out: Path) -> list[tuple[float, ...]]:
    names = ("step", "epoch", "train/loss", "train/learning_rate")
    return [tuple(line[n] for n in names) for line in read_log(out / "metrics.jsonl") if "train/loss" in line]
