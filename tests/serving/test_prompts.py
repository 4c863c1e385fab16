"""How a conversation becomes a prompt: as in training, else by the chat template, else not at all."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from coadapt.data.segments import Framing
from coadapt.demo import BASE
from coadapt.serving.errors import Refusal
from coadapt.serving.prompts import of_conversation
from coadapt.serving.schemas import Message


def turns(*said: tuple[Any, str]) -> list[Message]:
    return [Message(role=role, content=text) for role, text in said]


TALK = turns(("system", "Be short."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?"))


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def test_by_the_chat_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    wanted = "<system>Be short.<user>Hi<assistant>Yes?<user>Why?<assistant>"
    for framing in (None, Framing(style="chat", separator="")):
        assert tokenizer.decode(of_conversation(TALK, tokenizer, framing, "base")) == wanted
    developer = [Message(role="developer", content="Be short."), *TALK[1:]]
    assert tokenizer.decode(of_conversation(developer, tokenizer, None, "base")) == wanted


def test_as_in_training(tokenizer: Any) -> None:
    roles = of_conversation(TALK, tokenizer, Framing(style="roles", separator=""), "task")
    wanted = "system: Be short.\nuser: Hi\nassistant: Yes?\nuser: Why?\nassistant:"
    assert list(roles) == tokenizer(wanted)["input_ids"]
    assert wanted.endswith(Framing(style="roles").prompt("Why?", tokenizer))
    plain = of_conversation(TALK[1:2], tokenizer, Framing(separator=" ->"), "task")
    assert list(plain) == tokenizer("Hi ->")["input_ids"]
    with pytest.raises(Refusal, match=r"task was trained on single questions.*system, user, assistant, user"):
        of_conversation(TALK, tokenizer, Framing(), "task")


def test_not_at_all(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(Refusal, match=r"base cannot chat: its tokenizer has no chat template.*/v1/completions"):
        of_conversation(TALK, tokenizer, None, "base")
    tokenizer.chat_template = "{{ raise_exception('No systems here.') }}"
    with pytest.raises(Refusal, match="No systems here"):
        of_conversation(TALK, tokenizer, None, "base")
