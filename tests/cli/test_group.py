"""Help is quick, errors are one message, exit codes are 0, 1 and 2."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coadapt.cli.group import VERBS, group

Call = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib")


@pytest.mark.parametrize("args", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\nfrom coadapt.cli.group import run\nassert run(sys.argv[1:]) == 0\n"
        f"print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_the_list_of_verbs_says_what_each_verb_says() -> None:
    for verb, line in VERBS.items():
        found = group.get_command(group.make_context("coadapt", [verb], resilient_parsing=True), verb)
        assert found is not None
        assert str(found.help).startswith(line), verb


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["tarin"], 2, "There is no verb 'tarin'. Did you mean train?"),
        (["train", "--modle", "x"], 2, "--model"),
        (["train"], 2, "model is missing"),
        (["train", "--model", "m", "--data", "d", "metod=lora"], 2, "Did you mean 'method'"),
        (["train", "--model", "m", "--data", "d", "lora"], 2, "write name=value"),
        (["train", "--model", "nowhere/", "--data", "nothing.csv"], 1, "there is no such file or folder"),
        (["generate", "--prompt", "x"], 1, "Which base? Give --model"),
        (["generate", "--adapter", "nowhere", "--prompt", "x"], 1, "There is no adapter folder 'nowhere'"),
        (["generate", "--adapters", "a", "--prompt", "x"], 2, "give --adapter too"),
        (["merge", "--adapter", "nowhere"], 2, "--out"),
        (["show"], 2, "Give an adapter folder, or --model"),
        (["show", "nowhere"], 1, "There is no folder 'nowhere'"),
        (["--version"], 0, ""),
    ],
)
def test_exit_codes_and_messages(
    args: list[str], code: int, message: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found, _, said = call(*args)
    assert (found, message in said) == (code, True), said
    assert "Traceback" not in said


def test_a_mistake_of_ours_is_told_apart_and_debug_shows_it(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("inner")

    monkeypatch.setattr("coadapt.training.inspect.folder_tables", broken)
    code, _, said = call("show", tmp_path)
    assert code == 1
    assert "KeyError: 'inner'" in said
    assert "COADAPT_DEBUG=1" in said
    monkeypatch.setenv("COADAPT_DEBUG", "1")
    with pytest.raises(KeyError):
        call("show", tmp_path)


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "from coadapt.cli import main; main(['train', '--help'])"
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert b"Traceback" not in writer.stderr.read()
    writer.stderr.close()
    writer.wait(timeout=30)
