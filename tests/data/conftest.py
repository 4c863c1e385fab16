"""Tokenizers whose tokens are bytes, and files made of rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from byte_tokenizer import TEMPLATE, byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def shared_tokenizer() -> PreTrainedTokenizerBase:
    """The same one for every example of a property test."""
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer(chat_template=TEMPLATE)


@pytest.fixture
def jsonl(tmp_path: Path) -> Any:
    def write(*rows: dict[str, Any], name: str = "data.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(file)

    return write
