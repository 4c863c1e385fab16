"""What the Tab key offers: in a real bash, and without loading anything heavy."""

import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coadapt.cli.group import VERBS

Call = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib")
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="there is no bash here")


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `coadapt` is a program, as it is after an installation."""
    program = tmp_path / "bin" / "coadapt"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom coadapt.cli import main\nmain()\n")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PS1": "$ ", "TERM": "dumb"}


def offered(shell: dict[str, str], *line: str) -> list[str]:
    """What bash offers for the last of these words."""
    assert BASH is not None
    script = (
        'eval "$(coadapt completion bash)"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_coadapt_completion coadapt; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run([BASH, "-c", script, "bash", *line], env=shell, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@needs_bash
def test_bash_is_offered_verbs_flags_and_values(shell: dict[str, str]) -> None:
    assert offered(shell, "coadapt", "") == list(VERBS)
    assert offered(shell, "coadapt", "chat", "--adapter") == ["--adapter", "--adapters"]
    assert offered(shell, "coadapt", "train", "--task", "seq") == ["seq2seq", "sequence-classification"]
    assert offered(shell, "coadapt", "train", "--method", "bot") == ["bottleneck"]
    assert offered(shell, "coadapt", "completion", "") == ["bash", "zsh", "fish"]
    assert offered(shell, "coadapt", "nonsense", "") == list(VERBS)


@needs_bash
def test_paths_are_completed_where_a_person_types_them(shell: dict[str, str], tmp_path: Path) -> None:
    assert BASH is not None
    (tmp_path / "my-adapter").mkdir()
    (tmp_path / "my-rows.jsonl").touch()
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execve(BASH, [BASH, "--norc", "--noprofile", "-i"], shell)
    seen, until = "", time.monotonic() + 60

    def types(text: str, then: str) -> None:
        nonlocal seen
        os.write(terminal, text.encode())
        while then not in seen:
            assert time.monotonic() < until, seen
            seen += os.read(terminal, 4096).decode("utf-8", "replace")
        seen = seen.partition(then)[2]

    types('eval "$(coadapt completion bash)"; echo rea"d"y\n', "ready\r\n")
    types("coadapt chat --adapter my-a\t", "my-adapter/")
    types("\x15coadapt train --data my-r\t", "my-rows.jsonl")
    types("\x15exit\n", "exit")
    os.close(terminal)
    os.waitpid(process, 0)


@pytest.mark.parametrize("words", ["coadapt ", "coadapt train --", "coadapt chat --adapter x"])
def test_it_imports_nothing_heavy(words: str) -> None:
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded:', *(name for name in {HEAVY} if name in sys.modules)))\n"
        "from coadapt.cli import main\nmain([])\n"
    )
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_COADAPT_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=True
    )
    *found, last = done.stdout.splitlines()
    assert last == "loaded:"
    assert found[0].startswith(("plain,", "dir,"))


@pytest.mark.parametrize(("shell_name", "word"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete ")])
def test_each_shell_gets_its_script(call: Call, shell_name: str, word: str) -> None:
    code, text, said = call("completion", shell_name)
    assert (code, said) == (0, "")
    assert word in text
    assert "_COADAPT_COMPLETE" in text


def test_another_shell_is_refused(call: Call) -> None:
    code, _, said = call("completion", "csh")
    assert (code, "'csh' is not one of" in said) == (2, True)
