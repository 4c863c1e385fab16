"""The demo, with fewer rows than a person gets: it runs offline, keeps its numbers, leaves a folder to go on with."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from coadapt.cli import demo

Call = Callable[..., tuple[int, str, str]]


def shown(text: str) -> dict[str, str]:
    """Who answered -> the share that was right."""
    return dict(re.findall(r"^  (the base|prompt \+ lora|prompt|lora) +(\d+%)", text, re.MULTILINE))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAIN_ROWS", 96)
    monkeypatch.setattr(demo, "HELD_OUT_ROWS", 8)
    monkeypatch.setattr(demo, "ASKED", 3)
    monkeypatch.setattr(demo, "LONGEST", 8)


@pytest.mark.usefixtures("short")
def test_the_demo_keeps_its_numbers_and_its_base(call: Call, tmp_path: Path) -> None:
    texts = [call("demo", "--out", tmp_path / name)[1] for name in ("a", "b")]
    losses = [re.findall(r"held-out loss (\d+\.\d+)", text) for text in texts]
    assert losses[0] == losses[1]
    assert float(losses[0][-1]) < 0.7 * float(losses[0][0])
    assert list(shown(texts[0])) == ["the base", "prompt", "lora", "prompt + lora"]
    assert "3 of 3 answers are the same; unmerged: the base is bit for bit what it was" in " ".join(texts[0].split())
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {"prompt", "lora", "loss.png", "run.yaml", "README.md"}
    assert call("demo", "--out", tmp_path / "a")[0] == 1


@pytest.mark.full
def test_the_base_fails_the_task_and_both_adapters_together_learn_it(call: Call, tmp_path: Path) -> None:
    code, text, said = call("demo", "--out", tmp_path / "demo")
    assert code == 0, said
    right = {who: int(share.rstrip("%")) for who, share in shown(text).items()}
    assert right["the base"] == 0
    assert right["prompt + lora"] > max(right["prompt"], right["lora"], 50)
