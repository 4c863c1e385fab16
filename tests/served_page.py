"""The page in a process of its own, and a browser that looks at it."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
START = "from coadapt.cli import main; main()"
QUESTION = "Max saw the green hat on the roof.\nQ: What color is the hat?\nA:"


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def begin(folder: Path, port: int, *args: str) -> subprocess.Popen[bytes]:
    """`coadapt ui` in `folder`, from where it answers."""
    log = (folder / "ui.log").open("wb")
    command = [sys.executable, "-c", START, "ui", "--port", str(port), *args]
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths})
    log.close()
    end = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            return process
        time.sleep(0.1)
    process.kill()
    process.wait()
    raise AssertionError((folder / "ui.log").read_text())


@contextmanager
def running(folder: Path, port: int, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """Context: `coadapt ui` serves."""
    process = begin(folder, port, *args)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def browser() -> Iterator[object]:
    """Context: Chromium. Skips the test where it, or what drives it, is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not installed")
    api.expect.set_options(timeout=120_000)
    with api.sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield window
        window.close()


def opened(page: object, port: int) -> list[str]:
    """Opens the page, and waits until what it remembers is there; the hosts that are asked for something, from now."""
    hosts: list[str] = []
    page.on("request", lambda r: hosts.extend(re.findall(r"^\w+://([^/]+)", r.url)))  # type: ignore[attr-defined]
    page.goto(f"http://127.0.0.1:{port}/")  # type: ignore[attr-defined]
    settled(page)
    return hosts


def settled(page: object) -> None:
    """Waits for the page to have put back what it remembers."""
    page.locator(".ca-ready").wait_for(state="attached", timeout=120_000)  # type: ignore[attr-defined]
