"""The command line as a person calls it: arguments in, text and exit code out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from byte_tokenizer import save_base
from coadapt.cli.group import run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs `coadapt ...` in this process: (exit code, standard output, standard error)."""
    monkeypatch.delenv("COADAPT_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("coadapt.cli.output.quiet", lambda: None)

    def call(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{a}?", "completion": f" {a}!"}) + "\n" for a in range(20)), "utf-8")
    return file
