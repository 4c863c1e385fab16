"""Which tokens are trained on. The tokenizer's tokens are bytes, so expected labels can be written as text."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from coadapt.data.columns import Told, find_format
from coadapt.data.segments import Framing, find_framing, segments
from coadapt.data.tokens import IGNORED, CausalEncoder, LabelEncoder, PairEncoder, Tally, join, leading_tokens


def encode(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tally: Tally | None = None, **options: Any
) -> list[dict[str, Any]]:
    kinds = {name: "list" if isinstance(value, list) else "text" for name, value in row.items()}
    form = find_format(kinds, Told(), "causal-lm")
    framing = find_framing(form, kinds, tokenizer, "\n")
    encoder = CausalEncoder(tokenizer=tokenizer, form=form, framing=framing, **{"max_length": 1000, **options})
    return list(encoder(row, tally or Tally()))


def marked(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The example as text, its trained tokens between [ and ]."""
    text, trained = "", False
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORED)
        if (label != IGNORED) != trained:
            trained = not trained
            text += "[" if trained else "]"
        text += tokenizer.decode([token])
    return text + "]" * trained


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "hello"}, "<s>[hello</s>]"),
        ({"prompt": "2+2=", "completion": " 4"}, "<s>2+2=[ 4</s>]"),
        ({"prompt": "two", "completion": "zwei"}, "<s>two\n[zwei</s>]"),
        ({"prompt": "", "completion": "zwei"}, "<s>[zwei</s>]"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "<s>Add\n1 1\n[2</s>]"),
        ({"question": "Why?", "answer": "So."}, "<s>Why?\n[So.</s>]"),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            "<s>user: Hi\nassistant:[ Ho</s>]",
        ),
    ],
)
def test_trained_tokens_without_a_chat_template(
    row: dict[str, Any], expected: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert [marked(e, tokenizer) for e in encode(row, tokenizer)] == [expected]


CONVERSATION = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Ho"},
    {"from": "human", "value": "Bye"},
    {"from": "gpt", "value": "So long"},
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"conversations": CONVERSATION},
            "<turn>system\nBe brief.</turn>\n<turn>user\nHi</turn>\n<turn>assistant\n[Ho</turn>\n]"
            "<turn>user\nBye</turn>\n<turn>assistant\n[So long</turn>\n]",
        ),
        (
            {"instruction": "Add", "input": "1 1", "output": "2", "history": [["Say", "said"]]},
            "<turn>user\nSay</turn>\n<turn>assistant\nsaid</turn>\n"
            "<turn>user\nAdd\n1 1</turn>\n<turn>assistant\n[2</turn>\n]",
        ),
        ({"prompt": "2+2=", "completion": " 4"}, "<s>2+2=[ 4</s>]"),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "old"}],
                "completion": [{"role": "assistant", "content": "new"}],
            },
            "<turn>user\nHi</turn>\n<turn>assistant\nold</turn>\n<turn>assistant\n[new</turn>\n]",
        ),
    ],
)
def test_trained_tokens_with_a_chat_template(
    row: dict[str, Any], expected: str, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert [marked(e, chat_tokenizer) for e in encode(row, chat_tokenizer)] == [expected]


def test_a_template_without_an_end_of_turn_gets_an_end_of_sequence(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat_tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    [example] = encode(row, chat_tokenizer)
    assert example["labels"][-1] == chat_tokenizer.eos_token_id


def test_all_tokens_train_when_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    [example] = encode({"prompt": "two", "completion": "zwei"}, tokenizer, completion_only_loss=False)
    assert marked(example, tokenizer) == "<s>[two\nzwei</s>]"


@given(
    text=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=80), room=st.integers(3, 20)
)
def test_no_token_of_a_long_text_is_lost(text: str, room: int, shared_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = shared_tokenizer
    examples = encode({"text": text}, tokenizer, max_length=room)
    bodies = [e["labels"][1:] for e in examples]
    assert list(chain(*bodies)) == [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert all(e["input_ids"][0] == tokenizer.bos_token_id and len(e["input_ids"]) <= room for e in examples)


def test_what_is_cut_and_dropped_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    tally = Tally()
    rows = [("ask", "answer"), ("much too long to leave room", "answer"), ("ask", ""), ("ask", "a" * 30)]
    examples = [e for p, c in rows for e in encode({"prompt": p, "completion": c}, tokenizer, tally, max_length=16)]
    assert [marked(e, tokenizer) for e in examples] == ["<s>ask\n[answer</s>]", "<s>ask\n[" + "a" * 11 + "]"]
    assert (tally.rows, tally.truncated, tally.longest) == (4, 2, 36)
    assert tally.dropped == {"no trained token within max_length": 1, "empty": 1}
    assert tally.trained == len("answer") + 1 + 11


def test_a_turn_without_a_role_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"Turn 1 of a conversation has no role"):
        encode({"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}, tokenizer)


def test_sources_and_targets(tokenizer: PreTrainedTokenizerBase) -> None:
    form = find_format({"source": "text", "target": "text"}, Told(), "seq2seq")
    encoder = PairEncoder(tokenizer=tokenizer, form=form, max_length=100)
    [example] = encoder({"source": "ab", "target": "xyz"}, Tally())
    assert tokenizer.decode(example["input_ids"]) == "<s>ab"
    assert tokenizer.decode(example["labels"]) == "<s>xyz</s>"


def test_classes_by_name_and_by_number(tokenizer: PreTrainedTokenizerBase) -> None:
    form = find_format({"text": "text", "label": "number"}, Told(), "sequence-classification")
    encoder = LabelEncoder(tokenizer=tokenizer, form=form, classes=("no", "yes"), max_length=100)
    tally = Tally()
    rows = [("a", "yes"), ("b", 0), ("c", "perhaps"), ("d", None)]
    labels = [e["labels"] for text, label in rows for e in encoder({"text": text, "label": label}, tally)]
    assert labels == [1, 0]
    assert tally.dropped == {"a class that no training row has": 1, "empty": 1}


def test_the_prompt_that_is_asked_later_begins_the_example_that_was_trained(
    tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows: list[tuple[PreTrainedTokenizerBase, dict[str, Any]]] = [
        (tokenizer, {"prompt": "Hi", "completion": "Ho"}),
        (tokenizer, {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}),
        (chat_tokenizer, {"question": "Hi", "answer": "Ho"}),
    ]
    for one, row in rows:
        kinds = {name: "list" if isinstance(value, list) else "text" for name, value in row.items()}
        form = find_format(kinds, Told())
        framing = find_framing(form, kinds, one, "\n")
        untrained = "".join(s.text for s in segments(row, form, framing, one)).split("Ho")[0]
        assert framing.prompt("Hi", one) == untrained.rstrip(" ")


def test_a_completion_is_tokenised_in_the_light_of_its_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    pieces = segments(
        {"prompt": "a", "completion": "b"},
        find_format({"prompt": "text", "completion": "text"}, Told()),
        Framing(separator=" "),
        tokenizer,
    )
    ids, labels = join(pieces, tokenizer, leading_tokens(tokenizer))
    assert ids == [*tokenizer("a b").input_ids, tokenizer.eos_token_id]
    assert [label != IGNORED for label in labels] == [False, False, False, True, True]
