"""A tiny base and a few rows to train on, and the run that one process makes of them."""

from pathlib import Path

import pytest

from devices.ranks import Together, Told, settings
from tiny_run import base as base
from tiny_run import rows as rows


@pytest.fixture(scope="session")
def unbroken(base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Told]]:
    place = tmp_path_factory.mktemp("unbroken")
    told = Together(place / "ranks", 1, settings(base, rows, place / "out", 4, 2)).ended()
    assert told[0].code == 0, told[0].said
    return place / "out", told
