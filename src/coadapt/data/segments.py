"""A row as pieces of text, each trained on or not: what all formats of text have in common."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from coadapt.data.columns import Format

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
"""Other names of the roles of a conversation."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of text."""

    text: str
    trained: bool
    ends: bool = False
    """An end-of-sequence token follows."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a prompt is put to the model, in training and afterwards alike."""

    style: Literal["plain", "roles", "chat"] = "plain"
    """As it is; as `user: …` and `assistant: …` lines; through the tokenizer's chat template."""
    separator: str = "\n"
    """Between a plain prompt and its completion, where neither has white space there."""

    def prompt(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text that the model continues when it is asked `text`."""
        match self.style:
            case "plain":
                return text + self.between(text)
            case "roles":
                return f"user: {text}\nassistant:"
            case "chat":
                return _render([{"role": "user", "content": text}], None, tokenizer, True)

    def between(self, prompt: str, completion: str = "") -> str:
        """What joins a prompt to its completion."""
        joined = prompt[-1:].isspace() or completion[:1].isspace() or not prompt
        return "" if joined else self.separator


def find_framing(
    form: Format, features: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, separator: str
) -> Framing:
    """Chat where rows are conversations or instructions and the tokenizer has a template for them."""
    talks = form.kind == "messages" or (form.kind == "pair" and features[form.columns["prompt"]] == "list")
    if tokenizer.chat_template is not None and (talks or form.kind == "instruction"):
        return Framing(style="chat", separator="")
    if form.kind == "text":
        return Framing(separator="")
    return Framing(style="roles", separator="") if talks else Framing(separator=separator)


def segments(
    row: Mapping[str, Any], form: Format, framing: Framing, tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    """The pieces of one row; none where it has no text.

    Raises:
        ValueError: the row does not have the form that its format asks for.
    """
    cells = {role: row[column] for role, column in form.columns.items()}
    match form.kind:
        case "text":
            return [Segment(text=cells["text"], trained=True, ends=True)] if cells["text"] else []
        case "messages":
            return _conversation(read_messages(cells["messages"]), _tools(cells.get("tools")), tokenizer)
        case "pair" if isinstance(cells["prompt"], list) or isinstance(cells["completion"], list):
            return _conversation(_joined(cells), None, tokenizer)
        case "pair":
            return _pair(cells["prompt"], cells["completion"], framing)
        case _ if framing.style == "chat":
            return _conversation(as_messages(cells), None, tokenizer)
        case _:
            return _pair(as_prompt(cells), cells["completion"], framing)


def as_prompt(cells: Mapping[str, Any]) -> str:
    """System text, earlier turns, instruction and input of an instruction row, one under the other."""
    earlier = [part for turn in cells.get("history") or [] for part in turn]
    parts = [cells.get("system"), *earlier, cells["prompt"], cells.get("input")]
    return "\n".join(str(part) for part in parts if part)


def as_messages(cells: Mapping[str, Any]) -> list[Message]:
    """An instruction row as a conversation; only its last answer is trained on."""
    found: list[Message] = [{"role": "system", "content": cells["system"]}] if cells.get("system") else []
    for asked, answered in cells.get("history") or []:
        found += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answered, "trained": False},
        ]
    asked = as_prompt({"prompt": cells["prompt"], "input": cells.get("input")})
    if not asked or not cells["completion"]:
        return []
    return [
        *found,
        {"role": "user", "content": asked},
        {"role": "assistant", "content": str(cells["completion"])},
    ]


def read_messages(turns: Sequence[Mapping[str, Any]] | None) -> list[Message]:
    """Turns with `role` and `content`, or `from` and `value`, under the usual names.

    Raises:
        ValueError: a turn without a role, or with neither content nor tool calls.
    """
    found: list[Message] = []
    for number, turn in enumerate(turns or []):
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if role is None or (content is None and not turn.get("tool_calls")):
            raise ValueError(f"Turn {number} of a conversation has no role or no content: {dict(turn)}.")
        # Tables fill fields that only some turns have with None, which templates would take for values.
        rest = {k: v for k, v in turn.items() if k not in ("role", "from", "content", "value") and v is not None}
        found.append({"role": ROLES.get(str(role), str(role)), "content": content or "", **rest})
    return found


def _tools(value: Any) -> list[Any] | None:
    return (json.loads(value) if isinstance(value, str) else list(value)) if value else None


def _joined(cells: Mapping[str, Any]) -> list[Message]:
    prompt, completion = (
        read_messages(cells[side] if isinstance(cells[side], list) else [{"role": role, "content": cells[side]}])
        for side, role in (("prompt", "user"), ("completion", "assistant"))
    )
    return [*({**m, "trained": False} for m in prompt), *completion]


def _pair(prompt: Any, completion: Any, framing: Framing) -> list[Segment]:
    if completion is None or completion == "":
        return []
    prompt, completion = str(prompt or ""), str(completion)
    asked = prompt + framing.between(prompt, completion)
    return [Segment(text=asked, trained=False), Segment(text=completion, trained=True, ends=True)]


def _conversation(
    messages: list[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
) -> list[Segment]:
    if tokenizer.chat_template is not None:
        return list(_templated(messages, tools, tokenizer))
    return list(_with_roles(messages))


def _with_roles(messages: list[Message]) -> Iterator[Segment]:
    for message in messages:
        role, content = message["role"], message["content"]
        if _is_trained(message):
            yield Segment(text=f"{role}:", trained=False)
            yield Segment(text=f" {content}", trained=True, ends=True)
        else:
            yield Segment(text=f"{role}: {content}\n", trained=False)


def _is_trained(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("trained", True)


def _templated(
    messages: list[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Segment]:
    """The rendered conversation, cut where each trained answer begins and ends.

    An answer is what rendering it adds to the conversation before it. A template that renders earlier turns otherwise
    once later ones have come (it drops their thoughts, say) has no such place, and the turn is not trained on.
    """
    plain = [{k: v for k, v in m.items() if k != "trained"} for m in messages]
    whole = _render(plain, tools, tokenizer, False) if plain else ""
    at = 0
    for number, message in enumerate(messages):
        if not _is_trained(message):
            continue
        before = _render(plain[:number], tools, tokenizer, True)
        after = _render(plain[: number + 1], tools, tokenizer, False)
        if not (whole.startswith(before) and whole.startswith(after) and len(before) < len(after)):
            continue
        yield Segment(text=whole[at : len(before)], trained=False)
        answer = whole[len(before) : len(after)]
        stops = any(answer.rstrip().endswith(token) for token in tokenizer.all_special_tokens)
        yield Segment(text=answer, trained=True, ends=not stops)
        at = len(after)
    yield Segment(text=whole[at:], trained=False)


def _render(messages: list[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase, ask: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    assert isinstance(text, str)
    return text
