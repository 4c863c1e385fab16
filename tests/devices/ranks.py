"""`coadapt train` in several processes, forked from a server that has imported everything; what each of them saw."""

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import killing
from coadapt.data.tokens import IGNORED
from coadapt.training import run
from coadapt.training.joint import JointTrainer
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
    found: dict[str, Any] = {"rows": [], "state": None}
    step, finish, end = JointTrainer.training_step, run.finish, Interrupt.on_step_end

    def training_step(self: Any, model: Any, inputs: Any, count: Any = None) -> Tensor:
        trained = inputs["labels"].ne(IGNORED).any(-1)  # others fill up the last batches of a pass
        found["rows"].append((self.state.global_step, inputs["input_ids"][trained].tolist()))
        return step(self, model, inputs, count)

    def finished(settings: Any, trainer: Any, view: Any, *rest: Any) -> Any:
        found["state"] = {n: t.clone() for n, t in view.state_dict().items() if not n.endswith("_extra_state")}
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
        found = torch.load(place) if place.is_file() else {"state": None, "rows": []}
        log = place.with_suffix(".log")
        assert process.exitcode is not None
        return Told(process.exitcode, log.read_text("utf-8") if log.is_file() else "", found["state"], found["rows"])
