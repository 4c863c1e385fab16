"""A server in a thread of this process, on a free port: the demo's base, and adapters trained for a few steps."""

import asyncio
import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from coadapt import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.demo import BASE
from coadapt.demo.task import examples
from coadapt.serving.app import Serving
from coadapt.serving.catalog import Catalog, Entry
from coadapt.serving.engine import Engine
from coadapt.serving.limits import Limits
from coadapt.serving.server import Service, bound
from coadapt.training.folder import write_provenance


@dataclass(frozen=True, kw_only=True)
class Server:
    """One that runs."""

    address: str
    serving: Serving
    stop: Callable[[], None]

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, **more)


@contextmanager
def running(
    adapters: Path, *, key: str | None = None, limits: Limits | None = None, stop_after: float = 5.0, **engine: Any
) -> Iterator[Server]:
    """A server with the adapters of a folder, out of which clients can load."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    view = PeftModel(AutoModelForCausalLM.from_pretrained(BASE)).eval()
    made = Engine(view, tokenizer, **engine)
    entries = [Entry.read(name, adapters / name) for name in ("task", "other", "soft")]
    for entry in entries:
        made.offer(entry.name, entry.folder)
    serving = Serving(
        view=view,
        tokenizer=tokenizer,
        engine=made,
        catalog=Catalog(made, base="base", root=str(BASE), entries=entries, adapters_dir=adapters),
        limits=limits or Limits(),
        key=key,
    )
    where = bound("127.0.0.1", 0, key)
    service, answers = Service(serving, where, stop_after=stop_after), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(service.run(answers.set)))
    thread.start()
    try:
        assert answers.wait(30)
        yield Server(address=f"http://127.0.0.1:{where.getsockname()[1]}", serving=serving, stop=service.stop)
    finally:
        if thread.is_alive():
            service.stop()
            service.stop()
        thread.join(30)
        where.close()
        assert not thread.is_alive()


Start = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of the demo's task: two LoRAs, and a prompt; and copies of one, to be loaded."""
    folder = tmp_path_factory.mktemp("adapters")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    configs = {
        "task": LoraConfig(r=8, target_modules="all-linear"),
        "other": LoraConfig(r=4, target_modules="all-linear"),
        "soft": PromptTuningConfig(num_virtual_tokens=8),
    }
    for number, (name, config) in enumerate(configs.items()):
        torch.manual_seed(number)
        view = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config)
        optimizer = torch.optim.AdamW(view.param_groups({"default": 2e-2}))
        for step in range(12):
            rows = [row["prompt"] + row["completion"] for row in examples("train", 8, 10 * number + step)]
            batch = tokenizer(rows, return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            view(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        view.save_pretrained(folder / name)
        write_provenance(folder / name, prompt={"style": "plain", "separator": ""})
    shutil.copytree(folder / "task", folder / "spare")
    return folder


@pytest.fixture(scope="session")
def server(adapters: Path) -> Iterator[Server]:
    with running(adapters) as one:
        yield one


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with server.client() as one:
        yield one


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with server.http() as one:
        yield one


@pytest.fixture(scope="session")
def start(adapters: Path) -> Start:
    """Starts another server with the same adapters; options as of `running`."""
    return functools.partial(running, adapters)


PROMPT = "Mia hid the kite.\nQ: Who hid the kite?\nA:"


@pytest.fixture(scope="session")
def expected(adapters: Path) -> Callable[..., str]:
    """What `generate` of transformers answers, one row at a time: the server must say the same."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    view = PeftModel(AutoModelForCausalLM.from_pretrained(BASE)).eval()
    for name in ("task", "other", "soft"):
        view.load_adapter(adapters / name, name)

    @functools.cache
    def answer(composition: str | None, text: str = PROMPT, tokens: int = 12) -> str:
        batch = tokenizer(text, return_tensors="pt")
        with view.using(composition or []) if composition else view.disable_adapter():
            out = view.generate(**batch, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer
