"""Several processes that train one run together (torchrun, accelerate launch): who writes, and what they agree on."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

GRACE = 5.0
"""Seconds that a process that failed waits for what the others say of it."""


class Elsewhere(RuntimeError):
    """The run failed, and another process has said why."""


def first() -> bool:
    """Whether this process writes and speaks for all: it is alone, or the first of them."""
    return rank() == 0


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_any(here: bool, device: torch.device) -> bool:
    """Whether something holds on any process. All of them have to ask at the same step."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return here
    found = torch.tensor(int(here), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


@contextmanager
def together(use_cpu: bool) -> Iterator[None]:
    """Joins the processes. One that fails inside ends all, and is the only one to say why.

    Raises:
        Elsewhere: another process failed, and says so.
        RuntimeError: this one failed and the others did not; or another has ended without a word.
    """
    if count() == 1:
        yield
        return
    PartialState(cpu=use_cpu)
    # It outlives the connections, which tell the others that this process is going.
    store = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    except Exception as error:
        raised = _settled(store, error)
        if raised is error:
            raise
        raise raised from error


def _settled(store: Any, error: Exception) -> Exception:
    """What this process is to raise of an error: it, with its number; or that another has told."""
    lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    told = "" if lost else str(error)
    with suppress(Exception):
        store.set(f"coadapt/failed/{rank()}", told)
        dist.destroy_process_group()
    others = [other for other in range(count()) if other != rank()]
    heard = _heard(store, "failed", others)
    with suppress(Exception):
        store.set(f"coadapt/gone/{rank()}", "")
    if first():  # the store may be kept by this process
        _heard(store, "gone", others)
    if lost and any(heard.values()):
        return Elsewhere("another process said what is wrong")
    if lost:
        return RuntimeError(
            "Another process of this run ended without a word (killed, or out of memory). Checkpoints are as they "
            f"were: go on with --resume. ({str(error).strip().splitlines()[0]})"
        )
    if any(heard.get(other) == told for other in range(rank())):
        return Elsewhere(told)
    if len([text for text in heard.values() if text == told]) == len(others):
        return error  # all of them
    return RuntimeError(f"process {rank()} of {count()} failed: {_named(error)}")


def _named(error: Exception) -> str:
    known = isinstance(error, ValueError | OSError | TypeError | RuntimeError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _heard(store: Any, what: str, others: Iterable[int]) -> dict[int, str]:
    """What other processes say, by their numbers; those that say nothing within the time are left out."""
    until, found = time.monotonic() + GRACE, dict[int, str]()
    for other in others:
        with suppress(Exception):  # also where the process that kept the store has gone
            store.wait([f"coadapt/{what}/{other}"], timedelta(seconds=max(until - time.monotonic(), 0.01)))
            found[other] = store.get(f"coadapt/{what}/{other}").decode()
    return found
