"""Processes to be killed with SIGKILL, forked from a server that has imported everything: a start costs little."""

import itertools
import multiprocessing
import os
import resource
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import coadapt.training.run  # noqa: F401  imported once, by the server
from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from coadapt.cli.group import run
from coadapt.core.composition import Sum
from coadapt.training.folder import damage
from models import llama, stir

SERVER = multiprocessing.get_context("forkserver")


def start(target: Any, *args: Any) -> BaseProcess:
    """A process of its own that calls `target`, a function of this file."""
    SERVER.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    process = SERVER.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def state(number: int) -> PeftModel:
    """A view in one of two states, whose folders differ in every file: ranks, gates, and who has a training state."""
    view = get_peft_model(llama(), LoraConfig(r=2 + number))
    view.add_adapter("task", PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=number == 0))
    view.set_adapter(Sum("default", "task", weights=(0.25 + number, 1)))
    stir(view.adapters, seed=1 + number)
    return view


def save_in_turn(folder: Path, first: int, ready: Connection) -> None:
    """Saves one state, then the other, until it is killed."""
    torch.set_num_threads(1)
    views = [state(first), state(1 - first)]
    ready.send(None)
    for view in itertools.cycle(views):
        view.save_pretrained(folder)


def command(log: Path, *args: str) -> None:
    """`coadapt ...` as a person calls it; what it says goes to `log`, its exit code is the process's."""
    torch.set_num_threads(1)
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        code = run(args)
    sys.exit(code)


def command_without_room(log: Path, most: int, *args: str) -> None:
    """The same where no file can have more than `most` bytes: what a full disk is to a program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    command(log, *args)


def command_that_is_cut_off(log: Path, out: Path, touch: int, *args: str) -> None:
    """The same, killed at the `touch`-th time that it turns to a file while a checkpoint in `out` is not whole.

    So the kill is within the writing of a checkpoint, or its removal, however fast or busy the machine is.
    """
    left, looking = touch, False

    def hear(event: str, _: Any) -> None:
        nonlocal left, looking
        if looking or not event.startswith(("open", "os.", "shutil.")):
            return
        looking = True  # which opens files itself
        with suppress(OSError):  # of another thread's
            left -= any(damage(path) for path in out.glob("checkpoint-*"))
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        looking = False

    sys.addaudithook(hear)
    command(log, *args)
