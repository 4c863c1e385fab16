"""Other libraries beside a view: what they need is made here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from byte_tokenizer import save_base
from coadapt import PeftModel
from laws.setting import attach

Make = Callable[..., PeftModel]


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a base that reads bytes, and of its tokenizer."""
    return str(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def tokenizer(saved: str) -> Any:
    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture
def view_of(saved: str) -> Make:
    """Makes a view of that base with an adapter for each case, all active and none at its start."""
    return lambda *cases, by=0.1: attach(AutoModelForCausalLM.from_pretrained(saved).eval(), "llama", *cases, by=by)
