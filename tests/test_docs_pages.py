"""The first ten minutes, and one page a task: whoever copies their lines, from the first to the last, gets no error."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from coadapt.cli.group import run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = ["start.md", *(f"tasks/{file.name}" for file in sorted((DOCS / "tasks").iterdir()))]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.yaml)\n")


@pytest.mark.filterwarnings("ignore:A row can have up to:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_what_it_says_can_be_typed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python, commands after a `$`, and YAML files that name themselves in their first line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": page}
    found = FENCED.findall((DOCS / page).read_text("utf-8"))
    assert any(kind == "python" for kind, _ in found) or any(kind == "console" for kind, _ in found)
    for kind, text in found:
        if kind == "python":
            exec(compile(text, page, "exec"), names)
        elif kind == "console":
            for line in re.findall(r"^\$ (.+)$", text.replace("\\\n", ""), re.MULTILINE):
                program, *args = shlex.split(line)
                assert program == "coadapt", line
                assert run(args) <= (args[0] == "data"), line  # it finds something in the demo's rows, and says so
        elif named := NAMED.match(text):
            Path(named[1]).write_text(text, "utf-8")


def test_the_page_of_commands_is_what_they_print() -> None:
    """`python tools/commands_page.py` writes it anew. In a process of its own: click keeps the help of a first call."""
    tool = [sys.executable, str(ROOT / "tools" / "commands_page.py"), "--print"]
    printed = subprocess.run(tool, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert (DOCS / "commands.md").read_text("utf-8") == printed
