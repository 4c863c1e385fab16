"""Which kind of data a table is, told by the names of its columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

Kind = Literal["text", "pair", "instruction", "messages", "labelled", "tagged", "pictured"]
"""What a row becomes: one text · a prompt and its completion · an instruction and its answer · a conversation · a text
and its class · words and the tag of each · an image and its class."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Columns that the user has named; None is to be found."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    label: str | None = None
    image: str | None = None

    def given(self) -> dict[str, str]:
        """Role -> column, of those that were named."""
        return {role: column for role, column in vars(self).items() if column is not None}


@dataclass(frozen=True, kw_only=True)
class Format:
    """What was found: `name` for people, `kind` for the code, the column of each role."""

    name: str
    kind: Kind
    columns: Mapping[str, str]
    note: str | None = field(default=None)

    def beside(self, column: str, columns: Sequence[str]) -> "Format":
        """The same, where one more of the table's `columns` is used."""
        idle = self.note is not None and self.note == _unused(columns, self.columns)
        return replace(self, note=_unused([c for c in columns if c != column], self.columns)) if idle else self


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A known set of columns: every role needs one of its names; roles in `also` may be missing."""

    name: str
    kind: Kind
    needs: Mapping[str, Sequence[str]]
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def match(self, present: Sequence[str]) -> dict[str, str] | None:
        """Role -> column, or None."""
        by_lower = {column.lower(): column for column in present}
        found: dict[str, str] = {}
        for role, names in {**self.needs, **self.also}.items():
            column = next((by_lower[n] for n in names if n in by_lower and by_lower[n] not in found.values()), None)
            if column is not None:
                found[role] = column
            elif role in self.needs:
                return None
        return found


LABEL = ("label", "labels", "category", "class", "intent", "topic")
PATTERNS = (
    Pattern(
        name="messages",
        kind="messages",
        needs={"messages": ("messages", "conversations")},
        also={"tools": ("tools",)},
    ),
    Pattern(name="prompt + completion", kind="pair", needs={"prompt": ("prompt",), "completion": ("completion",)}),
    Pattern(
        name="instruction + output",
        kind="instruction",
        needs={"prompt": ("instruction",), "completion": ("output", "response", "completion")},
        also={"input": ("input", "context"), "system": ("system",), "history": ("history",)},
    ),
    Pattern(
        name="source + target",
        kind="pair",
        needs={"prompt": ("source", "document", "src"), "completion": ("target", "summary", "tgt")},
    ),
    Pattern(
        name="question + answer",
        kind="instruction",
        needs={
            "prompt": ("question", "query", "problem", "prompt"),
            "completion": ("answer", "response", "output", "target", "solution"),
        },
        also={"system": ("system",)},
    ),
    Pattern(
        name="text + label",
        kind="labelled",
        needs={"text": ("text", "sentence", "sentence1", "premise", "question1"), "label": LABEL},
        also={"second": ("text2", "text_pair", "sentence2", "second", "hypothesis", "question2")},
    ),
    Pattern(name="text", kind="text", needs={"text": ("text", "sentence", "content")}),
    Pattern(
        name="tokens + tags",
        kind="tagged",
        needs={"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels")},
    ),
    Pattern(
        name="image + label",
        kind="pictured",
        needs={"image": ("image", "img", "image_path", "file_name"), "label": LABEL},
    ),
)
"""Tried in this order."""

KINDS_OF_TASK: Mapping[str | None, set[Kind]] = {
    "causal-lm": {"text", "pair", "instruction", "messages"},
    "seq2seq": {"pair", "instruction"},
    "sequence-classification": {"labelled"},
    "token-classification": {"tagged"},
    "image-classification": {"pictured"},
}


def find_format(features: Mapping[str, str], told: Told, task: str | None = None) -> Format:
    """The format of a table.

    Args:
        features: column -> "text", "list", "number" or "other".
        told: columns that the user named.
        task: "causal-lm", "seq2seq", "sequence-classification", "token-classification", "image-classification", or None
            where the data may decide.

    Raises:
        ValueError: preference data, a named column that is not there, or columns that fit nothing; says what to do.
    """
    columns = list(features)
    if missing := [c for c in told.given().values() if c not in features]:
        raise ValueError(f"There is no column {missing[0]!r}; the columns are {', '.join(columns)}.")
    if told.given():
        return _as_told(told, task)
    if {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            "This is preference data (columns chosen and rejected), which coadapt does not train on yet. To train on "
            "the chosen answers only: prompt_column=prompt completion_column=chosen."
        )
    fitting = KINDS_OF_TASK.get(task, set(get_args(Kind)))
    for pattern in PATTERNS:
        if pattern.kind in fitting and (found := pattern.match(columns)) is not None:
            return Format(name=pattern.name, kind=pattern.kind, columns=found, note=_unused(columns, found))
    return _last_resort(features, task)


def _as_told(told: Told, task: str | None) -> Format:
    given = told.given()
    match sorted(given):
        case ["completion", "prompt"]:
            return Format(name="prompt + completion, as told", kind="pair", columns=given)
        case ["text"] if task != "seq2seq":
            return Format(name="text, as told", kind="text", columns=given)
        case ["label", "text"] if task == "token-classification":
            columns = {"tokens": given["text"], "tags": given["label"]}
            return Format(name="tokens + tags, as told", kind="tagged", columns=columns)
        case ["label", "text"]:
            return Format(name="text + label, as told", kind="labelled", columns=given)
        case ["image", "label"] if task in (None, "image-classification"):
            return Format(name="image + label, as told", kind="pictured", columns=given)
    raise ValueError(
        f"{', '.join(f'{role}_column={column}' for role, column in given.items())} is not enough"
        f"{f' for {task}' if task else ''}: name text_column, or prompt_column and completion_column, or text_column "
        "and label_column, or image_column and label_column."
    )


def _last_resort(features: Mapping[str, str], task: str | None) -> Format:
    """A `prompt` without a completion, or the only text that there is, is trained on as plain text."""
    texts = [column for column, kind in features.items() if kind == "text"]
    column = "prompt" if "prompt" in texts else texts[0] if len(texts) == 1 else None
    if column is not None and task in (None, "causal-lm"):
        other = next((c for c in texts if c != column), None)
        hint = (
            f"; to train {other} -> {column} instead: prompt_column={other} completion_column={column}" if other else ""
        )
        return Format(
            name="text",
            kind="text",
            columns={"text": column},
            note=f"the column {column!r} is taken as plain text{hint}",
        )
    wanted = {
        "seq2seq": "a source and a target text",
        "sequence-classification": "a text and a label",
        "token-classification": "a list of tokens and a list of their tags (text_column=… label_column=…)",
        "image-classification": "the path of an image and its label (image_column=… label_column=…)",
    }.get(str(task), "text, messages, or prompt and completion")
    pair = (
        f"prompt_column={texts[0]} completion_column={texts[1]}"
        if len(texts) > 1
        else "prompt_column=… completion_column=…"
    )
    raise ValueError(
        f"The columns {', '.join(features)} fit none of the known formats; {wanted} was looked for. Say which is which:"
        f" text_column={texts[0] if texts else '…'}, or {pair}, or text_column=… label_column=…"
    )


def _unused(columns: Sequence[str], found: Mapping[str, str]) -> str | None:
    rest = [c for c in columns if c not in found.values()]
    return f"columns not used: {', '.join(rest)}" if rest else None
