"""Data with faults that are put there: each is found, counted and named, and nothing else is."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import models
from byte_tokenizer import save_base
from coadapt.data.check import Finding, spread
from coadapt.training.data_check import DataCheck, check_data
from coadapt.training.settings import DataToCheck


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte is a token, a text begins with one more, an answer ends with one."""
    return str(save_base(tmp_path_factory.mktemp("base")))


def checked(data: str, **settings: Any) -> DataCheck:
    (found,) = check_data(DataToCheck(data=data, **settings))
    return found


def by_what(check: DataCheck) -> dict[tuple[str, str], Finding]:
    found = {(f.what, f.split): f for f in check.findings}
    assert len(found) == len(check.findings)
    return found


GOOD = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(20)]


def test_good_data_is_fine(jsonl: Any, base: str) -> None:
    for settings in ({}, {"model": base}):
        found = checked(jsonl(*GOOD), eval_split=0.2, **settings)
        assert found.fine, found.findings
        assert [(split.name, split.rows) for split in found.splits] == [("train", 16), ("held out", 4)]
        assert found.format == "prompt + completion"


def test_lengths_are_counted_as_training_counts_them(jsonl: Any, base: str) -> None:
    rows = [{"prompt": "p" * n, "completion": "c" * n} for n in random.Random(0).sample(range(1, 50), 21)]
    in_tokens = sorted(2 * len(row["prompt"]) + 3 for row in rows)  # the first token, the separator, the last token
    found = checked(jsonl(*rows), model=base, eval_split=0).splits[0].lengths
    assert found is not None
    assert (found.unit, found.least, found.median, found.most) == ("tokens", in_tokens[0], in_tokens[10], in_tokens[-1])
    assert sum(n <= found.p95 for n in in_tokens) / len(in_tokens) >= 0.95
    characters = checked(jsonl(*rows), eval_split=0).splits[0].lengths
    assert characters is not None
    assert (characters.unit, characters.most) == ("characters", in_tokens[-1] - 3)


def test_quantiles() -> None:
    assert spread([], "tokens") is None
    found = spread(list(range(1, 101)), "tokens")
    assert found is not None
    assert (found.least, found.median, found.p95, found.most) == (1, 51, 96, 100)


def test_each_fault_is_found_where_it_is(jsonl: Any, base: str) -> None:
    rows = [
        *GOOD[:10],
        {"prompt": "question  3?", "completion": "answer 3"},  # 10: a copy of 3 but for white space
        {"prompt": "no answer", "completion": ""},  # 11
        {"prompt": "x" * 90, "completion": "never reached"},  # 12: nothing of its answer is left
        {"prompt": "x", "completion": "y" * 90},  # 13: cut
    ]
    found = checked(jsonl(*rows), model=base, eval_split=0, max_length=60)
    assert {key: (f.count, f.rows) for key, f in by_what(found).items()} == {
        ("duplicates", "train"): (1, (10,)),
        ("empty", "train"): (1, (11,)),
        ("masked", "train"): (1, (12,)),
        ("cut", "train"): (2, (12, 13)),
    }
    longest = 90 + 1 + len("never reached") + 2
    assert by_what(found)["cut", "train"].mend == f"max_length={longest} cuts none"
    assert checked(jsonl(*rows), model=base, eval_split=0, max_length=longest).splits == found.splits
    again = by_what(checked(jsonl(*rows), model=base, eval_split=0, max_length=longest))
    assert set(again) == {("duplicates", "train"), ("empty", "train")}


def test_held_out_rows_that_are_known_are_found(jsonl: Any) -> None:
    held = [GOOD[3], {"prompt": "question 4?", "completion": "another"}, {"prompt": "new?", "completion": "new"}]
    data, held_out = jsonl(*GOOD, name="a.jsonl"), jsonl(*held, name="b.jsonl")
    found = by_what(checked(data, eval_data=held_out))
    assert {key: f.rows for key, f in found.items()} == {
        ("leakage", "held out"): (0,),
        ("asked before", "held out"): (1,),
    }


def test_a_drawn_split_leaks_where_rows_are_copies(jsonl: Any) -> None:
    """Against the split that training draws, counted naively."""
    from coadapt.data.columns import Told
    from coadapt.data.prepare import plan, split_rows
    from coadapt.data.source import read

    rows = [GOOD[i % 7] for i in range(40)]
    data = jsonl(*rows)
    train, held = split_rows(plan(read(data), None, Told(), None), 0.25, 42)
    assert held is not None
    seen = {row["prompt"] for row in train}
    leaked = sum(row["prompt"] in seen for row in held)
    found = by_what(checked(data, eval_split=0.25))
    assert found["leakage", "held out"].count == leaked
    assert found["duplicates", "train"].count == len(train) - len(seen)


def test_labels_that_contradict_or_outnumber_each_other_are_found(jsonl: Any) -> None:
    rows = [{"text": f"text {i}", "label": "usual"} for i in range(30)]
    rows += [{"text": "text 5", "label": "rare"}, {"text": "another", "label": "rare"}]
    found = checked(jsonl(*rows), eval_split=0)
    assert found.splits[0].classes == Counter(usual=30, rare=2)
    assert {key: f.rows for key, f in by_what(found).items()} == {
        ("contradictions", "train"): (5, 30),
        ("classes", "train"): (),
    }


def test_text_that_the_tokenizer_does_not_know_is_found(jsonl: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "known": 2, "\n": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    models.llama().save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    rows = [{"prompt": "known", "completion": "known known"}, {"prompt": "known", "completion": "strange"}]
    found = by_what(checked(jsonl(*rows), model=str(tmp_path), eval_split=0))
    assert found["unknown", "train"].rows == (1,)


@pytest.mark.parametrize("model", [False, True])
def test_conversations_and_words_are_read(jsonl: Any, base: str, tmp_path: Path, model: bool) -> None:
    with_base = {"model": base} if model else {}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    again = [*turns[:1], {"role": "assistant", "content": "again"}]
    found = checked(jsonl({"messages": turns}, {"messages": again}), eval_split=0, **with_base)
    assert found.fine
    assert "⟦hello⟧" in found.sample.plain.replace(" hello", "hello").replace("</s>", "")
    bert = {"model": str(save_base(tmp_path / "bert", models.bert))} if model else {}
    words = [{"tokens": ["a", "b"], "tags": ["X", "Y"]}, {"tokens": [], "tags": []}]
    tagged = checked(jsonl(*words), eval_split=0, **bert)
    assert {key: f.rows for key, f in by_what(tagged).items()} == {("empty", "train"): (1,)}
    assert tagged.splits[0].classes == {"X": 1, "Y": 1}


def test_images_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("a/1", "red"), ("a/2", "red"), ("b/1", "blue"), ("b/2", "red"), ("b/3", None)):
        file = tmp_path / "train" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if colour is None:
            file.write_bytes(b"no image")
        else:
            Image.new("RGB", (4, 4), colour).save(file)
    held = tmp_path / "test" / "a"
    held.mkdir(parents=True)
    Image.new("RGB", (4, 4), "blue").save(held / "9.png")
    found = by_what(checked(str(tmp_path)))
    assert {key: f.rows for key, f in found.items()} == {
        ("empty", "train"): (4,),
        ("duplicates", "train"): (1,),
        ("contradictions", "train"): (0, 1, 3),
        ("asked before", "held out"): (0,),
    }


def test_what_cannot_be_read_is_refused(jsonl: Any) -> None:
    with pytest.raises(ValueError, match="max_length counts tokens: give the model"):
        checked(jsonl(*GOOD), max_length=5)
    with pytest.raises(ValueError, match="fit none of the known formats"):
        checked(jsonl({"mr": "a", "ref": "b"}))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        checked("nowhere.jsonl")
