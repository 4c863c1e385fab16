"""What pages show can be done: Python runs, YAML is that of a run or a comparison, commands are taken as they stand.

Pages that begin from nothing are run from the first line to the last (test_docs_pages.py, test_docs_composition.py,
test_readme.py). In all others a block of Python finds `START`. What cannot be run in a test has the reason in the line
above it: `<!-- not run here: needs a GPU -->`.
"""

import doctest
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from coadapt import LoraConfig, PeftModel
from coadapt.cli.group import group
from coadapt.demo import BASE
from coadapt.demo.task import batch_of, examples
from coadapt.training.settings import RunConfig
from coadapt.tuning.plan import CompareConfig
from models import stir

ROOT = Path(__file__).parent.parent
ALONE = ("README.md", "docs/start.md", "docs/composition.md", "docs/routing.md", "docs/index.md", "docs/tasks/")
"""Run by themselves, elsewhere (the landing page's three lines are the README's)."""
FILES = [ROOT / "README.md", *(f for at in ("docs", "examples", "packages") for f in sorted((ROOT / at).rglob("*.md")))]
PAGES = [file.relative_to(ROOT).as_posix() for file in FILES]
BLOCK = re.compile(r"(<!-- not run here: [^\n]+ -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str, kind: str) -> list[str]:
    found = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return [text for not_run, k, text in found if k == kind and not not_run]


OTHERS = [page for page in PAGES if not page.startswith(ALONE)]
WITH_PYTHON = [page for page in OTHERS if blocks(page, "python")]
WITH_YAML = [page for page in PAGES if blocks(page, "yaml")]


def start() -> dict[str, Any]:
    """START: a view with five LoRAs that do something, a tokenizer, rows and a batch of them."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = PeftModel(AutoModelForCausalLM.from_pretrained(BASE))
    for name in ("task", "style", "a", "b", "c"):
        model.add_adapter(name, LoraConfig(r=4))
    stir(model.adapters, seed=0, by=0.1)
    rows = examples("held-out", 3, seed=0)
    batch = batch_of(tokenizer, rows)
    return {
        "torch": torch, "model": model, "tokenizer": tokenizer, "held_out": rows, "batch": batch,
        "x": batch["input_ids"], "labels": batch["labels"], "loss_fct": torch.nn.CrossEntropyLoss(),
    }  # fmt: skip


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_its_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page, **start()}
    for number, text in enumerate(blocks(page, "python"), 1):
        code = text.replace('"DIR_OR_ID"', repr(str(BASE)))
        exec(compile(code, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and page != "docs/commands.md"])
def test_what_one_types_is_as_wide_as_a_page(page: str) -> None:
    """Longer lines are cut at the right, where a reader does not see that they go on."""
    typed = [text for kind in ("python", "yaml", "console") for text in blocks(page, kind)]
    assert [line for text in typed for line in text.splitlines() if len(line) > 88] == []


@pytest.mark.parametrize("page", WITH_YAML)
def test_its_yaml_is_one_that_is_read(page: str) -> None:
    for text in blocks(page, "yaml"):
        said = yaml.safe_load(text)
        if "methods" in said:
            assert CompareConfig.read(said).runs
        elif "model" in said:
            RunConfig(**said)
        else:  # a part of one
            assert said.keys() <= RunConfig.model_fields.keys()


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/commands.md"])
def test_its_commands_have_these_options(page: str) -> None:
    """Whatever begins a line of a block with `coadapt`; what it names (files, models) need not be there."""
    for _, kind, text in BLOCK.findall((ROOT / page).read_text("utf-8")):
        if kind in ("", "console", "sh", "bash", "text"):
            for line in re.findall(r"^(?:\$ )?coadapt (.+)$", text.replace("\\\n", ""), re.MULTILINE):
                taken(line)


def taken(line: str) -> None:
    """Parses a line up to what its values mean.

    Raises:
        click.UsageError: there is no such verb, or no such option of it.
    """
    words = shlex.split(line, comments=True)
    command: click.Command = group
    while isinstance(command, click.Group):
        context = click.Context(command)
        command = command.resolve_command(context, [words.pop(0)])[1] or group
    command.make_parser(click.Context(command, help_option_names=["-h", "--help"])).parse_args(words)


WITH_EXAMPLES = [file for file in sorted((ROOT / "src").rglob("*.py")) if ">>> " in file.read_text("utf-8")]


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=lambda file: file.stem)
def test_examples_in_docstrings_give_what_they_say(file: Path) -> None:
    name = ".".join(file.relative_to(ROOT / "src").with_suffix("").parts)
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted
    assert not done.failed


def test_an_option_that_there_is_not_is_found() -> None:
    with pytest.raises(click.UsageError):
        taken("train --no-such-option 1")
    with pytest.raises(click.UsageError):
        taken("tarin --model x")
