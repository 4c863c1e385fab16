"""Tiny models and data on the disk; nothing comes from a hub."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tiny import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789?!. "


@pytest.fixture
def tokenizer() -> Any:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def base_folder(tmp_path: Path, tokenizer: Any) -> Path:
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(2 * 7).reshape(2, 7) % 40 + 4


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    def made(kind: Any, **options: Any) -> Any:
        usual = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
        quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
        return kind(output_dir=str(tmp_path / "run"), **{**usual, **quiet, **options})

    return made
