"""A conversation with a loaded model: what was said, what of it the model is shown, and its answers. No terminal."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor

from coadapt.core import composition
from coadapt.core.composition import Sum, names
from coadapt.core.gates import Gate, Reading
from coadapt.evaluation.exam import virtual_tokens
from coadapt.formats.files import aside
from coadapt.model import PeftModel
from coadapt.training.ask import classifies, classify, say, tokens
from coadapt.training.assemble import positions
from coadapt.training.load import Ready

BASE = "the base"
NOTHING = "none"
"""What `use` takes for the base alone."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question, ready to be put to the model."""

    question: str
    inputs: dict[str, Tensor]
    longest: int
    """Tokens of the answer, at most."""
    left_out: int
    """How many of the oldest turns the model is not shown, since they do not fit."""
    again: bool
    """It was asked before, and the new answer takes the place of that one."""


@dataclass(frozen=True, kw_only=True)
class Attached:
    """An adapter of the model, and its part in what is active."""

    name: str
    kind: str
    parameters: int
    weight: str
    """Empty where it takes no part."""


class Chat:
    """Questions and answers, with what the model is shown of them.

    Args:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn.
        seed: of the drawing; asking again takes the next one.
        raw: each text goes to the model as it is.
        system: a system prompt.
        compare: the base answers beside the adapted model.
        beside: further compositions that answer beside it, too; they are shown the same conversation.

    Raises:
        ValueError: there is no place for a system prompt, nothing to compare with, or no adapter of that name.
    """

    def __init__(
        self,
        ready: Ready,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 42,
        raw: bool = False,
        system: str | None = None,
        compare: bool = False,
        beside: Sequence[str] = (),
    ) -> None:
        self.ready, self.max_new_tokens, self.temperature, self.seed = ready, max_new_tokens, temperature, seed
        self.raw = raw
        self.model = cast(Any, ready.model)
        self.view = ready.model if isinstance(ready.model, PeftModel) else None
        if classifies(ready.model, "Token"):
            raise ValueError("This model gives each word a tag; ask it with `coadapt generate`.")
        self.classifies = classifies(ready.model)
        self.turns: list[Turn] = []
        self.question: str | None = None
        self.tries = 0
        self._left_out = 0
        self._answered = False
        self.system: str | None = None
        self.compare, self.beside = False, list[str]()
        self.set_compare(compare)
        for text in beside:
            self.put_beside(text)
        self.set_system(system)

    # ---- what the model is shown -------------------------------------------------------------------------------------

    @property
    def alone(self) -> str | None:
        """Why each question is put by itself, without what was said before; None where the model is shown it all."""
        framing, template = self.ready.framing, self.ready.tokenizer.chat_template
        as_told = "as it is" if framing.style == "plain" and not framing.separator else "as in training"
        if self.classifies:
            return "this model answers with a class: each text is judged by itself"
        if self.raw:
            return "--raw: each text is put as it is, by itself"
        if self.model.config.is_encoder_decoder:
            return f"this model is an encoder-decoder: each question is put {as_told}, by itself"
        if self.ready.trained and framing.style != "chat":
            return "it was trained without a chat template: each question is put as in training, by itself"
        if template is None:
            return f"its tokenizer has no chat template: each question is put {as_told}, by itself"
        return None

    def set_system(self, text: str | None) -> None:
        """Sets the system prompt, or takes it away. Raises ValueError where the model has no place for one."""
        if text is not None:
            if (reason := self.alone) is not None:
                raise ValueError(f"There is no place for a system prompt: {reason}.")
            try:
                shown = self._render([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
            except ValueError:
                shown = ""
            if text.strip() not in shown:
                raise ValueError("There is no place for a system prompt in this model's chat template.")
        self.system = text

    def request(self, question: str, *, again: bool = False) -> Request:
        """The question with as much of the conversation as fits beside an answer; the oldest turns go first.

        Raises:
            ValueError: the question alone does not fit, or the chat template refuses it.
        """
        self.question = question
        again = again and self._answered
        turns = [] if self.alone else self.turns[: len(self.turns) - again]
        room, wanted = self.room, 0 if self._answers_apart else self.max_new_tokens
        left_out = min(self._left_out, len(turns))
        inputs = self._inputs(turns[left_out:], question)
        while room is not None and length(inputs) + wanted > room and left_out < len(turns):
            left_out += 1
            inputs = self._inputs(turns[left_out:], question)
        longest = self.max_new_tokens
        if room is not None and length(inputs) + wanted > room:
            longest = room - length(inputs)
            if longest < (0 if self._answers_apart else 1):
                raise ValueError(
                    f"The question has {length(inputs)} tokens as the model is asked it, and the model takes {room} "
                    "with the answer. Ask something shorter."
                )
        return Request(question=question, inputs=inputs, longest=longest, left_out=left_out, again=again)

    @property
    def room(self) -> int | None:
        """Tokens that the model takes, less the virtual ones of what is active; None where it does not say."""
        known = positions(self.model.config, self.ready.tokenizer)
        if not known:
            return None
        if self.view is None:
            return min(known)
        asked = [self.view.active_adapters, *(names(self.view.checked(text)) for text in self.beside)]
        return min(known) - max(virtual_tokens(self.view, one) for one in asked)

    @property
    def _answers_apart(self) -> bool:
        """Whether an answer takes no room beside the question."""
        return self.classifies or bool(self.model.config.is_encoder_decoder)

    def _inputs(self, turns: list[Turn], question: str) -> dict[str, Tensor]:
        if self.alone is not None:
            asked = question if self.raw else self.ready.framing.prompt(question, self.ready.tokenizer)
            return tokens(self.ready, asked, special=self.raw or self.ready.framing.style != "chat")
        shown = self._render([*self._messages(turns), {"role": "user", "content": question}])
        return tokens(self.ready, shown, special=False)

    def _messages(self, turns: list[Turn]) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        said = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        return system + said

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            text = self.ready.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"The model's chat template refuses this conversation: {error}") from error
        return cast(str, text)

    # ---- asking ------------------------------------------------------------------------------------------------------

    def answer(
        self,
        request: Request,
        hear: Callable[[str], None] = lambda piece: None,
        *,
        base: bool = False,
        using: str | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> str:
        """The model's answer.

        Args:
            hear: gets the answer piece by piece, as it comes.
            base: the base answers, whatever is active.
            using: this composition answers, whatever is active.
            stopped: asked after each token; True ends the answer there.
        """
        who: AbstractContextManager[Any] = nullcontext()
        if self.view is not None and (base or using is not None):
            who = self.view.disable_adapter() if base else self.view.using(using)
        with who:
            if self.classifies:
                found = classify(self.ready, request.inputs)
                hear(found)
                return found
            return say(
                self.ready,
                request.inputs,
                max_new_tokens=request.longest,
                temperature=self.temperature,
                seed=self.seed + self.tries,
                hear=hear,
                stopped=stopped,
            ).strip()

    def keep(self, request: Request, answer: str) -> None:
        """Makes the answer part of the conversation."""
        if request.again:
            self.turns.pop()
        self.turns.append(Turn(question=request.question, answer=answer))
        self._left_out = request.left_out
        self._answered = True

    def ask_new(self) -> None:
        """What comes next is another question, and not the last one again."""
        self.tries, self._answered = 0, False

    def ask_again(self) -> str:
        """The last question, to be asked with the next seed. Raises ValueError where nothing was asked."""
        if self.question is None:
            raise ValueError("Nothing was asked yet.")
        self.tries += 1
        return self.question

    def clear(self) -> None:
        """Forgets what was said; adapters and the system prompt stay."""
        self.turns, self.question, self._left_out = [], None, 0
        self.ask_new()

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def use(self, text: str) -> str:
        """Makes a composition active, as in "task + 0.5*style"; "none" is the base alone. What is active now.

        Raises:
            ValueError: there is no adapter, or none of that name; nothing was changed.
        """
        if self.view is None:
            raise ValueError("No adapter is loaded: start with --adapter.")
        self.view.set_adapter(Sum() if text == NOTHING and NOTHING not in self.view.peft_config else text)
        self._left_out = 0
        return self.active

    @property
    def active(self) -> str:
        """What is active, as text."""
        if self.view is None or not self.view.active_adapters:
            return "the base alone"
        return self.view.composition if isinstance(self.view.composition, str) else repr(self.view.composition)

    def attached(self) -> list[Attached]:
        """All adapters of the model."""
        if self.view is None:
            return []
        gates: dict[str, list[str]] = {}
        for name, gate in composition.terms(self.view.composition, lambda name: True):
            gates.setdefault(name, []).append(_number(gate))
        return [
            Attached(
                name=name,
                kind=str(config.peft_type).lower(),
                parameters=sum(p.numel() for p in self.view.get_adapter(name).parameters()),
                weight=" + ".join(gates.get(name, [])),
            )
            for name, config in self.view.peft_config.items()
        ]

    def set_compare(self, compare: bool) -> None:
        """Whether the base answers too. Raises ValueError where nothing but the base is there."""
        if compare and self.view is None:
            raise ValueError("There is nothing to compare with the base: start with --adapter.")
        self.compare = compare

    def put_beside(self, text: str) -> None:
        """Lets a composition answer beside what is active, and the base. Raises ValueError as `use` does."""
        self.set_compare(True)
        assert self.view is not None
        self.view.checked(text)
        if text not in self.beside:
            self.beside.append(text)
        self._left_out = 0

    def asked(self) -> list[tuple[str, dict[str, Any]]]:
        """Everybody who answers, with what `answer` is told then; what is active is told nothing."""
        active: list[tuple[str, dict[str, Any]]] = [(self.active, {})]
        if not self.compare:
            return active
        others = [(text, {"using": text}) for text in self.beside if text != self.active]
        return [(BASE, {"base": True}), *active, *others]

    # ---- files -------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """The conversation as rows that training reads: one row, or one for each question that was put by itself."""
        said = [turn for turn in self.turns if turn.answer]
        groups = [[turn] for turn in said] if self.alone else [said] if said else []
        return [{"messages": self._messages(group)} for group in groups]

    def save(self, file: Path, *, overwrite: bool = False) -> int:
        """Writes the conversation as JSON lines; how many.

        Raises:
            FileExistsError, FileNotFoundError: the file is there already; its folder is not.
            ValueError: nothing was said.
        """
        if not (rows := self.rows()):
            raise ValueError("Nothing was said yet, so there is nothing to save.")
        if file.is_dir() or not file.parent.is_dir():
            raise FileNotFoundError(f"{file} is no file that could be written: name a file in a folder that is there.")
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} is there already. Choose another name, or /save --overwrite {file}")
        with aside(file) as part:
            part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return len(rows)


def length(inputs: dict[str, Tensor]) -> int:
    """Tokens of a batch of one."""
    return inputs["input_ids"].shape[1]


def _number(gate: Gate) -> str:
    if gate.routed:
        return "routed"
    value = gate.value(Reading("", torch.empty(0), torch.empty(0)))
    return "one per row" if isinstance(value, Tensor) and value.numel() != 1 else f"{float(value):.4g}"
