"""How a server ends: what runs may finish, and nothing is left behind."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import killing
from coadapt.demo import BASE

LONG = {"model": "task", "prompt": "Once", "temperature": 1.9, "max_tokens": 60, "stream": True}


def slowly(one: Any) -> None:
    writer = one.serving.engine.writer
    turn, writer.ends = writer.turn, frozenset()
    writer.turn = lambda: (time.sleep(0.02), turn())


def test_what_runs_may_finish(start: Callable[..., Any]) -> None:
    with start() as one, one.http() as http:
        slowly(one)
        with http.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            one.stop()
            while http.get("/health").status_code == 200:
                pass
            found = http.post("/v1/completions", json={**LONG, "stream": False})
            assert (found.status_code, found.json()["error"]["code"]) == (503, "stopping")
            assert found.headers["retry-after"]
            assert http.get("/health").json()["error"]["code"] == "stopping"
            assert [line for line in lines if line][-1] == "data: [DONE]"


@pytest.mark.parametrize("again", [True, False])
def test_but_not_for_ever(start: Callable[..., Any], again: bool) -> None:
    with start(stop_after=60 if again else 0.1) as one, one.http() as http:
        slowly(one)
        with http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 200}) as stream:
            lines = stream.iter_lines()
            next(lines)
            for _ in range(1 + again):
                one.stop()
            last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopped"


def started(log: Path, adapters: Path, *more: str) -> tuple[Any, str]:
    """`coadapt serve` as a process, and its address."""
    process = killing.start(
        killing.command, log, "serve", str(adapters / "task"), "--model", str(BASE), "--port", "0", "--use-cpu", *more
    )
    for _ in range(600):
        said = log.read_text() if log.exists() else ""
        if found := re.search(r"at (http://127\.0\.0\.1:\d+)/v1 \(", said):
            return process, found[1]
        assert process.is_alive(), said
        time.sleep(0.05)
    raise AssertionError(said)


def test_signals(adapters: Path, tmp_path: Path) -> None:
    process, address = started(tmp_path / "log", adapters)
    assert process.pid is not None
    with httpx.Client(base_url=address, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
    process.join(30)
    assert process.exitcode == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_kill_leaves_nothing(adapters: Path, tmp_path: Path) -> None:
    before = sorted(adapters.rglob("*"))
    process, address = started(tmp_path / "log", adapters)
    port = int(address.rpartition(":")[2])
    httpx.get(f"{address}/health")
    process.kill()
    process.join(30)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    assert sorted(adapters.rglob("*")) == before
