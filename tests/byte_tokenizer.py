"""A tokenizer that needs no download: one token for each byte, and `<s>`, `</s>`, `<pad>` and two marks of turns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import models

SPECIAL = ["<pad>", "<s>", "</s>", "<turn>", "</turn>"]
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerBase:
    """Characters are single tokens; a text begins with `<s>`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *letters])}, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": SPECIAL[3:]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**special, **options})


def save_base(folder: Path, make: Callable[..., Any] = models.llama) -> Path:
    """A small random model that reads bytes, saved with its tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    make(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
