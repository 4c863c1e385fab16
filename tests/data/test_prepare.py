"""From a file to batches: the split, what is said, what is shown."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from coadapt.data.collate import Collator
from coadapt.data.columns import Told
from coadapt.data.prepare import Plan, Prepared, plan, prepare
from coadapt.data.show import describe, one_sample
from coadapt.data.source import read
from coadapt.data.tokens import IGNORED

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets" / "data"
needs_assets = pytest.mark.skipif(not ASSETS.is_dir(), reason=f"needs the real data in {ASSETS}")


def prepared(
    name: str, tokenizer: PreTrainedTokenizerBase, told: Told | None = None, **options: Any
) -> tuple[Plan, Prepared]:
    task = options.pop("task", "causal-lm")
    found = plan(read(name), None, told or Told(), task)
    options = {"max_length": 512, "eval_split": 0.25, "seed": 0, **options}
    return found, prepare(found, tokenizer, task=task, **options)


def texts(rows: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(ids) for ids in rows["input_ids"]]


def test_the_split_is_seeded_and_loses_no_row(jsonl: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    file = jsonl(*({"text": f"row {n}"} for n in range(12)))
    _, one = prepared(file, tokenizer)
    _, same = prepared(file, tokenizer)
    _, other = prepared(file, tokenizer, seed=1)
    assert one.held_out is not None
    assert other.held_out is not None
    assert same.train["input_ids"][:] == one.train["input_ids"][:] != other.train["input_ids"][:]
    train, held_out = texts(one.train, tokenizer), texts(one.held_out, tokenizer)
    assert sorted([*train, *held_out]) == sorted(f"<s>row {n}</s>" for n in range(12))
    assert len(held_out) == 3


def test_the_end_of_a_document_is_held_out(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 10, "utf-8")
    _, made = prepared(str(tmp_path / "a.txt"), tokenizer, max_length=11)
    assert made.held_out is not None
    whole = "".join(texts(made.train, tokenizer) + texts(made.held_out, tokenizer))
    assert whole.replace("<s>", "") == "0123456789" * 10 + "</s>"
    assert len(made.held_out) == round(0.25 * (len(made.train) + len(made.held_out)))


def test_without_a_trained_token_nothing_is_trained(jsonl: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    file = jsonl(*({"prompt": "a very long question", "completion": "x"} for _ in range(3)))
    with pytest.raises(
        ValueError, match=r"None of the 3 rows has a trained token: 3 rows \(no trained token within max_length\)"
    ):
        prepared(file, tokenizer, max_length=8, eval_split=0)


def test_a_tokenizer_without_an_end_is_refused(jsonl: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        prepared(jsonl({"text": "a"}), tokenizer)


def test_a_held_out_file_must_have_the_columns(jsonl: Any) -> None:
    train, other = jsonl({"text": "a"}), jsonl({"txt": "a"}, name="other.jsonl")
    with pytest.raises(ValueError, match=r"has no column 'text'.*it has txt"):
        plan(read(train), read(other), Told(), None)


def test_numbers_are_classes_in_their_own_order(jsonl: Any) -> None:
    file = jsonl(*({"text": "a", "label": n} for n in (10, 9, 2)))
    assert plan(read(file), None, Told(), None).classes == ("2", "9", "10")


def test_one_class_is_none(jsonl: Any) -> None:
    with pytest.raises(ValueError, match="fewer than two classes"):
        plan(read(jsonl({"text": "a", "label": "x"})), None, Told(), None)


def test_what_was_cut_dropped_and_left_is_said(jsonl: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "ask", "completion": c, "id": "1"} for c in ("yes", "", "y" * 40)]
    found, made = prepared(jsonl(*rows), tokenizer, max_length=16, eval_split=0)
    notes = "\n".join(made.notes)
    assert "columns not used: id" in notes
    assert "dropped 1 rows (empty)" in notes
    assert "1 of 3 rows were cut to max_length=16; the longest has 46 tokens" in notes
    assert "joined by '\\n'" in notes
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(describe(found, made))
    shown = console.export_text()
    assert "prompt + completion" in shown
    assert "3 rows, 2 examples" in shown


def test_a_sample_marks_what_is_trained(jsonl: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    file = jsonl({"prompt": "2+2=", "completion": "4"})
    _, made = prepared(file, tokenizer, eval_split=0)
    assert one_sample(made.train[0], tokenizer).plain == "<s>2+2=\n⟦4</s>⟧"
    assert "bold green" in {str(span.style) for span in one_sample(made.train[0], tokenizer).spans}


def test_a_batch_is_padded_on_the_right_and_padding_is_never_trained() -> None:
    rows = [
        {"input_ids": [5, 2], "attention_mask": [1, 1], "labels": [IGNORED, 2]},
        {"input_ids": [5, 6, 2], "attention_mask": [1, 1, 1], "labels": [IGNORED, 6, 2]},
    ]
    batch = Collator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[5, 2, 2], [5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED], [IGNORED, 6, 2]]
    classes = Collator(pad_token_id=0)([{"input_ids": [1], "attention_mask": [1], "labels": 3}] * 2)
    assert torch.equal(classes["labels"], torch.tensor([3, 3]))


@needs_assets
def test_prompts_of_a_real_table(tokenizer: PreTrainedTokenizerBase) -> None:
    name = str(ASSETS / "awesome-chatgpt-prompts" / "prompts_153.csv")
    _, made = prepared(name, tokenizer, Told(prompt="act", completion="prompt"), max_length=100_000, eval_split=0)
    assert len(made.train) == 153
    assert tokenizer.decode(made.train[-1]["input_ids"]).startswith(
        "<s>Buddha\nI want you to act as the Buddha (a.k.a."
    )


@needs_assets
def test_classes_of_real_tables(tokenizer: PreTrainedTokenizerBase) -> None:
    found, made = prepared(str(ASSETS / "sib200" / "eng_Latn"), tokenizer, task="sequence-classification")
    assert made.held_out is not None
    assert (len(made.train), len(made.held_out), len(found.classes)) == (701, 99, 7)


@needs_assets
def test_a_real_file_of_another_encoding_is_refused_by_its_byte() -> None:
    refused = 0
    for file in sorted((ASSETS / "snips").glob("*.json")):
        try:
            file.read_text("utf-8")
        except UnicodeDecodeError:
            refused += 1
            with pytest.raises(ValueError, match=r"is not UTF-8: line \d+ has the byte 0x"):
                read(str(file))
    if not refused:
        pytest.skip("every file of snips is UTF-8 here")
