"""docs/architecture.md: the files that it names are there, and the layers that it draws are those that are enforced."""

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return runpy.run_path(str(ROOT / "tools" / "architecture_picture.py"))


def test_the_files_that_it_names_are_there() -> None:
    named = set(re.findall(r"\b(?:core|formats|combining|exporting|evaluation|quant|serving)/\w+\.py", PAGE))
    assert len(named) > 25
    assert [name for name in sorted(named) if not (ROOT / "src" / "coadapt" / name).exists()] == []


def test_its_floors_are_the_layers(tool: dict[str, Any]) -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]
    layers = [re.findall(r"\((\w+)\)", layer) for layer in contract["layers"]]
    drawn = [names.split() for names, _ in tool["FLOORS"]]
    small = {"declared", "lora_options", "naming", "param_groups", "versions"}  # a single small file each
    assert drawn == [found for layer in layers if (found := [name for name in layer if name not in small])]


def test_its_pictures_are_there_and_can_be_drawn(tool: dict[str, Any], tmp_path: Path) -> None:
    tool["main"](tmp_path)
    shown = re.findall(r"\]\(pictures/(\w+)\.png\)", PAGE)
    assert shown == ["call", "package"]
    assert {file.stem for file in tmp_path.iterdir()} == set(shown)
    assert all((ROOT / "docs" / "pictures" / f"{name}.png").exists() for name in shown)
