"""The demo's base, adapters that were not trained but moved, and rows of the demo's task."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from coadapt import LoraConfig, PeftModel, PromptTuningConfig
from coadapt.data.columns import Told
from coadapt.data.prepare import plan, prepare
from coadapt.data.source import Source
from coadapt.demo import BASE
from coadapt.demo.task import examples
from coadapt.evaluation.exam import Exam
from coadapt.evaluation.metrics import chosen
from models import stir


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="session")
def view() -> PeftModel:
    """A LoRA and a prompt; both change what the base says."""
    made = PeftModel(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4), "lora")
    made.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=5))
    stir(made.adapters, by=0.3)
    return made.eval()


@pytest.fixture(scope="session")
def make(tokenizer: Any) -> Callable[..., Exam]:
    """An exam of the demo's questions; options are those of `Exam`."""

    def make(count: int = 6, metrics: Sequence[str] = ("exact_match", "perplexity"), **options: Any) -> Exam:
        source = Source(name="demo", rows=Dataset.from_list(examples("held-out", count, 3)))
        made = prepare(
            plan(source, None, Told(), "causal-lm"), tokenizer, task="causal-lm", max_length=200, eval_split=0, seed=0
        )
        options = {"max_new_tokens": 12, "tokenizer": tokenizer, **options}
        return Exam(rows=list(made.train), task="causal-lm", metrics=chosen(metrics, "causal-lm", True), **options)

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: dict[str, Any], name: str = "data.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return file

    return write
