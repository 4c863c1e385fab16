"""DistributedDataParallel over two processes: every gradient is that of one process which has all the rows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from laws import two_processes
from laws.two_processes import CASES, FULL, QUICK, SHARDED, Gradients

TESTS = Path(two_processes.__file__).parents[1]
LIMIT = 240
"""Seconds after which two processes that wait for each other are ended."""


def computed(folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """What each of two processes found."""
    paths = os.pathsep.join([str(TESTS), *(p for p in sys.path if p)])
    # A gradient with a dim of 1 can have another stride there than DDP's bucket, which it says and then copies.
    strict = ["-W", "error", "-W", "ignore:Grad strides do not match"]
    program = [sys.executable, *strict, str(two_processes.__file__)]
    running = [
        subprocess.Popen(
            [*program, str(rank), str(folder), *names], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=LIMIT)[1].decode() for process in running]
    except subprocess.TimeoutExpired:
        pytest.fail(f"Two processes waited for each other for {LIMIT} seconds.")
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return computed(tmp_path_factory.mktemp("quick"), list(QUICK))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return computed(tmp_path_factory.mktemp("full"), list(FULL))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return computed(tmp_path_factory.mktemp("sharded"), list(SHARDED))


def same(found: list[Gradients], expected: list[Gradients], within: float) -> None:
    assert len(found) == len(expected)
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.keys() == theirs.keys()
        none = [n for n in theirs if theirs[n] is None]
        assert none == [n for n in mine if mine[n] is None], step
        most = max(float(g.norm()) for g in theirs.values() if g is not None)
        for name, gradient in mine.items():
            other = theirs[name]
            if gradient is not None and other is not None:  # that of a key's bias is 0 but for rounding
                wrong = float((gradient - other).norm()) / max(float(other.norm()), 1e-3 * most)
                assert wrong < within, f"step {step}, {name}: {wrong}"


def holds(name: str, found: list[dict[str, Any]]) -> None:
    expected = CASES[name].run(None)
    within = 1e-4 if CASES[name].precision == "fp32" else 0.05
    for rank in (0, 1):
        assert name in found[rank], [(n, f) for n, f in found[rank].items() if isinstance(f, str)]
        assert not isinstance(found[rank][name], str), found[rank][name]
        same(found[rank][name], expected, within)
    assert any(g is not None and g.norm() > 0 for g in expected[-1].values())


@pytest.mark.parametrize("name", QUICK)
def test_each_gradient_is_that_of_one_process(name: str, quick: list[dict[str, Any]]) -> None:
    holds(name, quick)


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_each_gradient_is_that_of_one_process_elsewhere(name: str, full: list[dict[str, Any]]) -> None:
    holds(name, full)


@pytest.mark.full
@pytest.mark.parametrize("name", SHARDED)
def test_each_gradient_is_that_of_one_process_with_a_base_in_parts(name: str, sharded: list[dict[str, Any]]) -> None:
    holds(name, sharded)
