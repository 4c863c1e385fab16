"""The format that the names of columns tell."""

import pytest

from coadapt.data.columns import Told, find_format

TEXT = "text"


def columns(names: str, **other: str) -> dict[str, str]:
    return {**dict.fromkeys(names.split(), TEXT), **other}


@pytest.mark.parametrize(
    ("features", "task", "kind", "roles"),
    [
        (columns("text"), None, "text", {"text": "text"}),
        (columns("", messages="list"), None, "messages", {"messages": "messages"}),
        (columns("", messages="list", tools="list"), None, "messages", {"messages": "messages", "tools": "tools"}),
        (columns("id", conversations="list"), None, "messages", {"messages": "conversations"}),
        (columns("prompt completion"), None, "pair", {"prompt": "prompt", "completion": "completion"}),
        (
            columns("instruction input output text"),
            None,
            "instruction",
            {"prompt": "instruction", "completion": "output", "input": "input"},
        ),
        (columns("Question Answer"), None, "instruction", {"prompt": "Question", "completion": "Answer"}),
        (columns("problem solution"), None, "instruction", {"prompt": "problem", "completion": "solution"}),
        (columns("query response"), None, "instruction", {"prompt": "query", "completion": "response"}),
        (columns("document summary id"), None, "pair", {"prompt": "document", "completion": "summary"}),
        (columns("source target"), "seq2seq", "pair", {"prompt": "source", "completion": "target"}),
        (columns("sentence", label="number"), None, "labelled", {"text": "sentence", "label": "label"}),
        (
            columns("premise hypothesis", label="number"),
            None,
            "labelled",
            {"text": "premise", "second": "hypothesis", "label": "label"},
        ),
        (columns("text label"), "causal-lm", "text", {"text": "text"}),
        (columns("line", id="number"), None, "text", {"text": "line"}),
    ],
)
def test_known_columns(features: dict[str, str], task: str | None, kind: str, roles: dict[str, str]) -> None:
    found = find_format(features, Told(), task)
    assert (found.kind, dict(found.columns)) == (kind, roles)


def test_a_prompt_without_completion_is_text_and_the_other_reading_is_told() -> None:
    found = find_format(columns("act prompt"), Told())
    assert (found.kind, dict(found.columns)) == ("text", {"text": "prompt"})
    assert "prompt_column=act completion_column=prompt" in str(found.note)


def test_what_the_user_says_goes_before_what_would_be_found() -> None:
    found = find_format(columns("act prompt text"), Told(prompt="act", completion="prompt"))
    assert (found.kind, dict(found.columns)) == ("pair", {"prompt": "act", "completion": "prompt"})


def test_columns_left_over_are_told() -> None:
    assert "date, id" in str(find_format(columns("date text id"), Told()).note)


def test_preference_data_is_recognised_and_refused() -> None:
    with pytest.raises(ValueError, match=r"preference data.*completion_column=chosen"):
        find_format(columns("prompt chosen rejected"), Told())
    found = find_format(columns("prompt chosen rejected"), Told(prompt="prompt", completion="chosen"))
    assert found.kind == "pair"


@pytest.mark.parametrize(
    ("features", "told", "task", "message"),
    [
        (columns("mr ref"), Told(), None, "prompt_column=mr completion_column=ref"),
        (columns("text"), Told(text="txet"), None, "no column 'txet'; the columns are text"),
        (columns("text"), Told(), "seq2seq", "a source and a target text"),
        (columns("text"), Told(), "sequence-classification", "a text and a label"),
        (columns("a b"), Told(prompt="a"), None, "prompt_column=a is not enough"),
        (columns("", messages="list"), Told(), "seq2seq", "a source and a target text"),
    ],
)
def test_what_fits_nothing_says_what_to_write(
    features: dict[str, str], told: Told, task: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        find_format(features, told, task)
