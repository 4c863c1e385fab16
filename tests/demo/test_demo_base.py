"""The shipped base is what its card says, and the demo's text and task are fixed by their seeds."""

import re
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from coadapt.demo import BASE
from coadapt.demo.pretrain import BATCH, END, PAD, answered_right, batches, held_out_loss
from coadapt.demo.task import exact_match, examples
from coadapt.demo.text import documents, turn

Base = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def base() -> Base:
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


def generate(base: Base, prompts: list[str]) -> list[str]:
    model, tokenizer = base
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**batch, max_new_tokens=48, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_loss_is_what_the_card_says(base: Base) -> None:
    stated = re.search(r"Held-out loss:\*\* ([\d.]+) nats", (BASE / "README.md").read_text(encoding="utf-8"))
    assert stated is not None
    assert held_out_loss(*base) == pytest.approx(float(stated[1]), abs=2e-3)


def test_base_answers_what_the_card_says(base: Base) -> None:
    card = (BASE / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"Answers:\*\* (\d+)% of 128 fresh questions about one sentence are right, (\d+)%", card)
    assert stated is not None
    for sentences in (1, 2):
        assert answered_right(*base, sentences) == pytest.approx(int(stated[sentences]) / 100, abs=0.02)


def test_base_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 4_000_000


def test_base_answers_in_english_and_never_in_the_task_format(base: Base) -> None:
    rows = examples("held-out", 64, seed=0)
    generated = generate(base, [row["prompt"] for row in rows])
    assert exact_match(generated, rows).mean == 0
    english = re.compile(r" (The \w+ is [\w ]+|\w+ had the \w+)\.")
    assert all(english.fullmatch(answer.splitlines()[0]) for answer in generated)


def test_base_ends_what_it_says(base: Base) -> None:
    assert generate(base, [turn("What does the cow say?")]) == [" The cow says moo."]


def test_chat_template_is_the_form_that_the_base_knows(base: Base) -> None:
    message = {"role": "user", "content": "Who had the kite?"}
    text = base[1].apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text == turn("Who had the kite?")


def test_tokenizer_gives_back_every_document(base: Base) -> None:
    tokenizer = base[1]
    for document in islice(documents(3), 200):
        assert tokenizer.decode(tokenizer.encode(document)) == document
    assert tokenizer.convert_tokens_to_ids(END) == tokenizer.eos_token_id == tokenizer.bos_token_id


def test_text_is_fixed_by_its_seed() -> None:
    first, again, other = (list(islice(documents(seed), 100)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_batches_hold_one_document_a_row_and_train_no_padding(base: Base) -> None:
    tokenizer = base[1]
    texts = list(islice(documents(5), 2 * BATCH + 3))
    found = []
    for batch in batches(tokenizer, texts):
        padding = batch["input_ids"] == tokenizer.pad_token_id
        assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(padding, -100))
        found += tokenizer.batch_decode(batch["input_ids"])
    assert sorted(row.replace(PAD, "") for row in found) == sorted(f"{END}{text}{END}" for text in texts)


def test_task_is_fixed_by_its_seed() -> None:
    assert examples("train", 50, seed=1) == examples("train", 50, seed=1)
    assert examples("train", 50, seed=1) != examples("train", 50, seed=2)


def test_no_scene_stands_in_both_splits() -> None:
    splits = (examples(split, 4000, seed=0) for split in ("train", "held-out"))
    train, held_out = ({row["prompt"].splitlines()[0] for row in rows} for rows in splits)
    assert not train & held_out


def test_exact_match_counts_equal_answers_only() -> None:
    rows = examples("train", 4, seed=0)
    generated = [
        rows[0]["completion"],
        rows[1]["completion"].strip() + "\n",
        rows[2]["completion"] + " x",
        "",
    ]
    assert exact_match(generated, rows).mean == 0.5


def test_pretraining_text_holds_no_task_record() -> None:
    assert not any("thing: " in document for document in islice(documents(0), 20_000))
