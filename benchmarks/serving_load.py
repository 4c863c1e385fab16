"""Many clients at once: latencies and tokens a second of `coadapt serve`, with many adapters, one, and none.

    python -m benchmarks.serving_load [--clients 64] [--adapters 32] [--requests 4] [--tokens 32] [--out FOLDER]

Starts servers on free ports of this machine, asks them, and stops them: coadapt's with adapters of its own for the
clients, and transformers' own (`transformers serve`) with the same base. Nothing else is reached. A request is lost if
it is not answered to its end. Each answer under load is compared with that to the same question asked alone.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import coadapt
from coadapt import LoraConfig, get_peft_model
from coadapt.demo import BASE

from .report import machine, markdown

PEOPLE = ("Mia", "Tom", "Ana", "Ben", "Lily", "Sam", "Nora", "Max")
SAID = "red spoon, blue cup, green boat, red hat, black ring, red scarf, blue hat, green ring, black cup"
"""What the demo's base says again, so that an answer is as long as it may be."""
STARTS = 180.0
"""Seconds that a server has to start."""
PATIENCE = 300.0
"""Seconds after which a request is lost."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One request, and what came of it."""

    model: str
    prompt: str
    text: str
    first: float
    """Seconds to the first text."""
    whole: float
    """Seconds to the end."""
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """All requests of all clients."""

    heard: Sequence[Heard]
    seconds: float

    def cells(self, tokenizer: Any, alone: Mapping[tuple[str, str], str]) -> list[str]:
        """As a line of the table."""
        answered = [one for one in self.heard if one.ended]
        tokens = sum(len(tokenizer(one.text, add_special_tokens=False)["input_ids"]) for one in answered)
        same = sum(one.text == alone[one.model, one.prompt] for one in answered)
        times = [_percentiles([one.first for one in answered]), _percentiles([one.whole for one in answered])]
        lost = str(len(self.heard) - len(answered))
        rates = [f"{tokens / max(len(answered), 1):.0f}", f"{tokens / self.seconds:.0f}", f"{self.seconds:.1f}"]
        return [str(len(self.heard)), lost, f"{same}", *times, *rates]


def _percentiles(values: Sequence[float]) -> str:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [*values] * 99
    return " / ".join(f"{1000 * cuts[at - 1]:.0f}" for at in (50, 95, 99))


def adapters(folder: Path, base: str, count: int) -> list[str]:
    """LoRAs on all linear layers, with values drawn so that each answers otherwise."""
    names = [f"a{number:02d}" for number in range(count)]
    view = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=8, target_modules="all-linear"))
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in view.adapters.named_parameters():
                scale = 0.02 if key.endswith("B") else 0.2
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        view.save_pretrained(folder / name)
    return names


async def ask(client: httpx.AsyncClient, model: str, prompt: str, tokens: int, greedy: Mapping[str, Any]) -> Heard:
    """One streamed completion."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True, **greedy}
    began, first, text, ended = time.perf_counter(), 0.0, "", False
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or answer.status_code != 200 or "[DONE]" in line:
                    continue
                value = json.loads(line[6:])
                for choice in value.get("choices", ()):
                    text += choice.get("text") or ""
                    ended = ended or choice.get("finish_reason") in ("stop", "length")
                    first = first or (time.perf_counter() - began if text else 0.0)
    except httpx.HTTPError:
        ended = False
    return Heard(model=model, prompt=prompt, text=text, first=first, whole=time.perf_counter() - began, ended=ended)


async def load(address: str, models: Sequence[str], given: argparse.Namespace, clients: int, greedy: Any) -> Run:
    """So many clients at once, each with its own model, one request after another."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as client:

        async def one(number: int) -> list[Heard]:
            model, found = models[number % len(models)], list[Heard]()
            who = PEOPLE[number % len(PEOPLE)]
            for _ in range(given.requests):
                prompt = f"{who} says: {SAID}. Eva says it after {who}:"
                found.append(await ask(client, model, prompt, given.tokens, greedy))
            return found

        began = time.perf_counter()
        heard = [one for found in await asyncio.gather(*map(one, range(clients))) for one in found]
        return Run(heard=heard, seconds=time.perf_counter() - began)


async def alone(address: str, run: Run, given: argparse.Namespace, greedy: Any) -> dict[tuple[str, str], str]:
    """The same questions, one at a time."""
    async with httpx.AsyncClient(base_url=address, timeout=PATIENCE) as client:
        asked = sorted({(one.model, one.prompt) for one in run.heard})
        return {key: (await ask(client, *key, given.tokens, greedy)).text for key in asked}


@contextmanager
def serving(command: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """A server's address, while it runs. Raises RuntimeError with its last words where it does not start."""
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        process = subprocess.Popen([*command], stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        until = time.monotonic() + STARTS
        while not _answers(address):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(_last(log))
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _last(log: Path) -> str:
    lines = [line.strip(" │╭╰─╮╯") for line in log.read_text("utf-8", "replace").splitlines()]
    return next((line for line in reversed(lines) if re.search(r"\w", line)), "it says nothing")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def measured(
    command: Sequence[str], port: int, log: Path, ways: Mapping[str, tuple[Sequence[str], int]], given: Any, greedy: Any
) -> list[list[str]]:
    """A line of the table for each way of asking one server."""
    tokenizer, rows = AutoTokenizer.from_pretrained(given.model), list[list[str]]()
    with serving(command, port, log) as address:
        for what, (models, clients) in ways.items():
            asyncio.run(load(address, models, argparse.Namespace(requests=1, tokens=4), clients, greedy))  # warm
            run = asyncio.run(load(address, models, given, clients, greedy))
            known = asyncio.run(alone(address, run, given, greedy))
            rows.append([what, *run.cells(tokenizer, known)])
            print(" ".join(rows[-1]), flush=True)
    return rows


HEAD = (
    "who answers",
    "requests",
    "lost",
    "as alone",
    "first text, ms",
    "whole answer, ms",
    "tokens an answer",
    "tokens/s",
    "seconds",
)


def table(given: argparse.Namespace, folder: Path) -> tuple[list[list[str]], list[str]]:
    """All lines, and why some are missing."""
    names = adapters(folder / "adapters", given.model, given.adapters)
    base = Path(given.model).resolve().name
    ours = [sys.executable, "-c", "from coadapt.cli import main; main()", "serve", "--model", given.model, "--use-cpu"]
    ours += ["--adapters-dir", str(folder / "adapters"), "--rows", str(given.rows), "--queue", str(given.clients)]
    ours += ["--max-loaded", str(given.adapters), "--port"]
    ways = {
        f"coadapt, {given.clients} clients, {given.adapters} adapters": (names, given.clients),
        f"coadapt, {given.clients} clients, 1 adapter": (names[:1], given.clients),
        f"coadapt, {given.clients} clients, the base": ([base], given.clients),
        "coadapt, 1 client, 1 adapter": (names[:1], 1),
    }
    port = _free_port()
    rows = measured([*ours, str(port)], port, folder / "log", ways, given, {"temperature": 0})
    notes = list[str]()
    for what, flags in {"": [], ", --continuous-batching": ["--continuous-batching"]}.items():
        port = _free_port()
        program = shutil.which("transformers", path=str(Path(sys.executable).parent)) or "transformers"
        theirs = [program, "serve", given.model, "--device", "cpu", "--port", str(port), "--host", "127.0.0.1", *flags]
        way = {f"transformers serve{what}, {given.clients} clients, the base": ([given.model], given.clients)}
        greedy = {"generation_config": json.dumps({"do_sample": False}), "temperature": 0}
        try:
            rows += measured(theirs, port, folder / "log", way, given, greedy)
        except (RuntimeError, OSError, statistics.StatisticsError) as error:
            notes.append(f"`transformers serve{what}` does not answer here: {error}")
            print(notes[-1], flush=True)
    return rows, notes


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="folder of the base; left out, the demo's")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="of each client, one after another")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, at most")
    parser.add_argument("--rows", type=int, default=64, help="of coadapt's batch")
    parser.add_argument("--remark", default="", help="what else is to be said, such as what else the machine did")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows, notes = table(given, Path(folder))
    shown = "The demo's base" if given.model == str(BASE) else given.model
    text = (
        f"# Many clients at once, {date.today()}\n\n"
        f"`python -m benchmarks.serving_load --clients {given.clients} --adapters {given.adapters} --requests "
        f"{given.requests} --tokens {given.tokens} --rows {given.rows}` with coadapt {coadapt.__version__}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, on {machine()}, clients and server on the same "
        f"cores. {shown}; LoRAs of rank 8 on all linear layers; clients share the adapters out, and each asks "
        f"{given.requests} times, streamed, greedily, for {given.tokens} tokens. Times: p50 / p95 / p99. as alone: "
        f"answers that equal the one to the same question asked alone. {given.remark}\n\n{markdown(HEAD, rows)}\n"
    )
    text += "".join(f"\n{note}\n" for note in notes)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"serving_load-{date.today()}.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
