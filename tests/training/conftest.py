"""A tiny base, a few rows to train on, and a folder for what comes of it."""

from pathlib import Path

import pytest

from tiny_run import base as base
from tiny_run import rows as rows


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
