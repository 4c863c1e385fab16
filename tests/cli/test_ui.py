"""What `coadapt ui` says when it cannot begin; the page itself is in tests/ui."""

import socket
from pathlib import Path

import pytest

from coadapt.cli import ui
from coadapt.cli.group import run


def test_a_port_that_is_taken_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["ui", "--port", str(port), "--runs", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert told == f"error: Port {port} of 127.0.0.1 cannot be had: Address already in use. Give another with --port.\n"
    assert not (tmp_path / "runs").exists()


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ui, "find_spec", lambda name: None)
    assert run(["ui"]) == 2
    assert 'pip install "coadapt[ui]"' in capsys.readouterr().err


def test_runs_are_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(["ui", "--runs", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err
