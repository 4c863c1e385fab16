"""Words and their tags: how they are found, that a word's first token has its tag, what is shown and refused."""

from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from coadapt.data.columns import Told, find_format
from coadapt.data.prepare import Prepared, has_tags, plan, prepare
from coadapt.data.show import one_sample
from coadapt.data.source import Source, read
from coadapt.data.tokens import IGNORED

ROWS = [{"tokens": ["Mia", "sees", "Rome"], "ner_tags": ["PER", "O", "LOC"]}, {"tokens": ["a"], "ner_tags": ["O"]}]


def prepared(source: Source, tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[tuple[str, ...], Prepared]:
    task = "token-classification"
    found = plan(source, None, Told(), task)
    options = {"max_length": 64, "eval_split": 0.0, "seed": 0, **options}
    return found.classes, prepare(found, tokenizer, task=task, **options)


def test_a_word_s_first_token_has_its_tag_and_no_other_token_has_one(
    jsonl: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    classes, made = prepared(read(jsonl(*ROWS)), tokenizer)
    assert classes == ("LOC", "O", "PER")
    ids, labels = made.train[0]["input_ids"], made.train[0]["labels"]
    # One token for each byte, behind <s>.
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *"MiaseesRome"]
    assert labels == [IGNORED, 2, IGNORED, IGNORED, 1, *[IGNORED] * 3, 0, *[IGNORED] * 3]
    assert (made.tally.trained, made.tally.tokens) == (4, 14)
    assert one_sample(made.train[0], tokenizer, classes).plain == "<s> Mia⟦PER⟧ sees⟦O⟧ Rome⟦LOC⟧"


def test_numbers_with_names_are_those_names(tokenizer: PreTrainedTokenizerBase) -> None:
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-PER", "B-LOC"]))
    features = datasets.Features({"words": datasets.List(datasets.Value("string")), "tags": tags})
    rows = datasets.Dataset.from_dict({"words": [["Mia", "x"]], "tags": [[1, 0]]}, features=features)
    classes, made = prepared(Source(name="x", rows=rows), tokenizer)
    assert classes == ("O", "B-PER", "B-LOC")
    assert made.train[0]["labels"] == [IGNORED, 1, IGNORED, IGNORED, 0]


def test_words_that_are_cut_have_no_tag(jsonl: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    _, made = prepared(read(jsonl(*ROWS)), tokenizer, max_length=6)
    assert made.train[0]["labels"] == [IGNORED, 2, IGNORED, IGNORED, 1, IGNORED]
    assert any("1 of 2 rows were cut to max_length=6; the longest has 12 tokens" in note for note in made.notes)


def test_rows_that_do_not_fit_are_counted_with_the_reason(jsonl: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    odd = [{"tokens": ["a", "b"], "ner_tags": ["O"]}, {"tokens": [], "ner_tags": []}]
    _, made = prepared(read(jsonl(*ROWS, *odd)), tokenizer)
    assert made.tally.dropped == {"not as many tags as tokens": 1, "empty": 1}


def test_columns_that_hold_no_lists_are_refused(jsonl: Any) -> None:
    file = jsonl({"tokens": "a b", "tags": "O O"}, {"tokens": "a", "tags": "X"})
    with pytest.raises(ValueError, match="tokens and tags must hold lists, a tag for each token"):
        plan(read(file), None, Told(), "token-classification")


def test_which_data_is_of_tags(jsonl: Any) -> None:
    assert has_tags(read(jsonl(*ROWS)))
    assert not has_tags(read(jsonl({"text": "a", "label": "x"}, name="labelled.jsonl")))
    lists = {"mine": "list", "theirs": "list"}
    told = find_format(lists, Told(text="mine", label="theirs"), "token-classification")
    assert (told.kind, told.columns) == ("tagged", {"tokens": "mine", "tags": "theirs"})
    with pytest.raises(ValueError, match="a list of tokens and a list of their tags"):
        find_format(lists, Told(), "token-classification")
    # A text beside them is what a language model is trained on.
    assert find_format({"text": "text", "tokens": "list", "tags": "list"}, Told(), "causal-lm").kind == "text"
