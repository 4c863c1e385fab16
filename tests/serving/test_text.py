"""How tokens become text: whole characters, and nothing of a stop text."""

import random

import pytest

from coadapt.serving.text import Spelling
from serving.asking import TOKENIZER

BACKEND = TOKENIZER.backend_tokenizer
TEXT = "Grüße, 日本! 🙂🙂 ok"


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def pieces(spelling: Spelling, ids: list[int]) -> list[str]:
    out: list[str] = []
    for token in ids:
        out.append(spelling.add(token))
        if spelling.stopped:
            return out
    return [*out, spelling.rest()]


def test_no_half_characters() -> None:
    found = pieces(Spelling(BACKEND, tokens("a "), ()), tokens(TEXT))
    assert "".join(found) == TEXT
    assert all("\ufffd" not in piece for piece in found)
    assert len([piece for piece in found if piece]) == len(TEXT)


def test_half_a_character_at_the_end_is_not_sent() -> None:
    assert "".join(pieces(Spelling(BACKEND, tokens("a"), ()), tokens("x🙂")[:-1])) == "x"


def test_a_prompt_that_ends_in_half_a_character_is_not_repeated() -> None:
    ids = tokens("private 🙂")
    found = "".join(pieces(Spelling(BACKEND, ids[:-2], ()), [*ids[-2:], *tokens(" yes")]))
    assert "private" not in found
    assert found.endswith(" yes")


def test_special_tokens_have_no_text() -> None:
    assert "".join(pieces(Spelling(BACKEND, [1], ()), [1, *tokens("a"), 3, *tokens("b"), 2])) == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\nUser: two", ("\nUser:",), "one"),
        ("one\nUse it", ("\nUser:",), "one\nUse it"),
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("abc", ("bc", "ab"), ""),
        ("abc", ("c", "bc"), "a"),
        ("a🙂b", ("🙂",), "a"),
        ("ab", ("abc", "zz"), "ab"),
        ("", ("a",), ""),
    ],
)
def test_stop_texts_across_tokens(text: str, stop: tuple[str, ...], expected: str) -> None:
    spelling = Spelling(BACKEND, [1], stop)
    found = pieces(spelling, tokens(text))
    assert "".join(found) == expected
    assert spelling.stopped == (expected != text)


def test_pieces_are_the_text_up_to_the_first_stop() -> None:
    """Any text, any stop texts, against looking for them in the whole."""
    drawn = random.Random(0)
    for _ in range(300):
        text = "".join(drawn.choices("ab🙂", k=drawn.randrange(12)))
        stop = tuple("".join(drawn.choices("ab🙂", k=drawn.randrange(1, 4))) for _ in range(drawn.randrange(3)))
        ends = [text.find(s) + len(s) for s in stop if s in text]
        upto = text[: min(ends)] if ends else text  # what is there when the first of them is whole
        expected = upto[: min(upto.find(s) for s in stop if s in upto)] if ends else text
        assert "".join(pieces(Spelling(BACKEND, [1], stop), tokens(text))) == expected, (text, stop)
