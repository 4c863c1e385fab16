"""A tiny base with its tokenizer in a folder, and a few rows to train on: fixtures, for a conftest to import."""

import json

import pytest

from byte_tokenizer import save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    pairs = [{"prompt": f"{a}+{b}=", "completion": f" {a + b}"} for a in range(6) for b in range(5)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    return str(file)
