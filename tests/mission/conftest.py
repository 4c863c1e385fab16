"""What the scripts of the mission need: a tokenizer that is made here, and sentences to train on."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "i want you to act as a linux terminal",
    "i want you to act as a travel guide",
    "i want you to act as a poet and write a poem",
    "act as a teacher and explain the moon",
    "you are a guide and a poet",
    "write a poem on the moon",
    "explain the terminal to a poet",
    "i want a guide to the moon",
]


@pytest.fixture
def sentences() -> list[str]:
    return SENTENCES


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the sentences; the first three are padding, begin and end."""
    words = sorted({word for text in SENTENCES for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, model_input_names=["input_ids", "attention_mask"])
