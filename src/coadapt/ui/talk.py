"""Chats of the page: one loaded model that all of them share, one at a time, and a gate for each of its adapters."""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coadapt.core.composition import Node, Seq, Sum, as_text, names, without
from coadapt.core.gates import Learned
from coadapt.model import PeftModel
from coadapt.training.chat import BASE, Chat, Turn
from coadapt.training.load import Ready, load, tasks_told
from coadapt.training.machine import chosen


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The gates of what a folder was saved with."""

    saved: str
    """The composition, as text."""
    values: Mapping[str, float]
    """Adapter -> its gate; empty where a number does not say it."""
    why_none: str = ""
    """Why there are no numbers."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How an answer is made."""

    temperature: float = 0.0
    max_new_tokens: int = 128
    compare: bool = False
    gates: Mapping[str, float] = field(default_factory=dict[str, float])
    """Adapter -> gate; nothing: as it was saved."""


@dataclass
class Loaded:
    """A model with its adapters."""

    ready: Ready
    gates: Gates
    alone: str | None
    """Why each question is put by itself; None where the model is shown the whole conversation."""


def gates_of(view: Any) -> Gates:
    """The gates of what is active in a view."""
    if not isinstance(view, PeftModel):
        return Gates(saved=BASE, values={}, why_none="No adapter is loaded: the base answers.")
    node = view.composition
    values: dict[str, float] = {}
    try:
        saved = node if isinstance(node, str) else repr(node)
        for name, value in _leaves(node):
            if name in values:
                raise ValueError(f"{name} stands in it more than once")
            values[name] = value
        for name in view.peft_config:
            values.setdefault(name, 0.0)
    except ValueError as error:
        return Gates(saved=saved, values={}, why_none=f"Its gates are no single numbers ({error}); they stay as saved.")
    return Gates(saved=saved, values=values)


def _leaves(node: Node) -> Iterator[tuple[str, float]]:
    """Each adapter with the gate that stands before it. Raises ValueError for a gate that is no number."""
    if isinstance(node, str):
        yield node, 1.0
    elif isinstance(node, Seq):
        for child in node.children:
            yield from _leaves(child)
    else:
        if node.router is not None:
            raise ValueError(f"{node.router.name} chooses them")
        for child, weight in zip(node.children, node.weights, strict=True):
            value = _number(weight)
            if isinstance(child, str):
                yield child, value
            else:
                yield from _leaves(child)


def _number(weight: Any) -> float:
    match weight:
        case float():
            return weight
        case Learned() if not weight.per_layer:
            return round(float(weight.shares()[0]), 2)
        case Learned():
            raise ValueError("there is one for each layer")
        case _:
            raise ValueError("there is one for each row")


def gated(node: Node, values: Mapping[str, float]) -> Node:
    """The composition with these gates before its adapters; those that it lacks are added, one at 0 is left out.

    So an adapter at 0 is not there at all: what remains is, bit for bit, the model without it.
    """
    given = _with(node, values)
    new = [name for name in values if name not in names(node) and values[name]]
    if new:
        given = Sum(given, *new, weights=[1.0, *(values[name] for name in new)])
    for name in values:
        if not values[name]:
            given = without(given, name)
    return _plain(given)


def _with(node: Node, values: Mapping[str, float]) -> Node:
    if isinstance(node, str):
        return Sum(node, weights=[values[node]]) if values.get(node, 1.0) != 1 else node
    if isinstance(node, Seq):
        return Seq(*(_with(child, values) for child in node.children))
    children = [child if isinstance(child, str) else _with(child, values) for child in node.children]
    weights = [
        values.get(child, _number(weight)) if isinstance(child, str) else _number(weight)
        for child, weight in zip(node.children, node.weights, strict=True)
    ]
    return Sum(*children, weights=weights)


def _plain(node: Node) -> Node:
    """Without brackets around a sum in a sum that has no gate of its own."""
    if isinstance(node, str):
        return node
    if isinstance(node, Seq):
        return node.children[0] if len(node.children) == 1 else node
    parts: list[tuple[Node, Any]] = []
    for child, weight in zip(node.children, node.weights, strict=True):
        inner = _plain(child)
        if isinstance(inner, Sum) and weight == 1 and inner.router is None:
            parts += zip(inner.children, inner.weights, strict=True)
        else:
            parts.append((inner, weight))
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    return Sum(*(child for child, _ in parts), weights=[weight for _, weight in parts])


def shown(node: Node) -> str:
    """A composition as text; of none the base."""
    return as_text(node) if names(node) else BASE


class Talker:
    """Holds one model, the one that was last asked for, and answers one question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[str, str] | None = None
        self._loaded: Loaded | None = None

    def load(self, adapter: str, model: str = "") -> Loaded:
        """The model and adapters of a folder (of `model` alone, where none is given), loaded or still there.

        Raises:
            ValueError, OSError: there is no such folder, it names no base, or it is no model for conversations.
        """
        with self._lock:
            return self._load(adapter, model)

    def _load(self, adapter: str, model: str) -> Loaded:
        key = (adapter.strip(), model.strip())
        if self._loaded is None or key != self._key:
            if not any(key):
                raise ValueError("Choose a run, or write the folder of an adapter, or a base.")
            self._loaded = self._key = None  # before the next one is there: they need not fit in memory both
            ready = load(key[1] or None, Path(key[0]).expanduser() if key[0] else None, device=chosen(False))
            if (count := tasks_told(ready.model)) > 1:
                raise ValueError(f"It tells {count} tasks apart; ask it with: coadapt generate --task")
            chat = Chat(ready)
            _ = ready.tokenizer  # says what to do instead, where it takes images
            self._loaded, self._key = Loaded(ready=ready, gates=gates_of(ready.model), alone=chat.alone), key
        return self._loaded

    def composition(self, loaded: Loaded, gates: Mapping[str, float]) -> Node | None:
        """What these gates make active; None: what was saved, to the last bit of a learned gate."""
        view = loaded.ready.model
        same = all(value == gates.get(name, value) for name, value in loaded.gates.values.items())
        if not isinstance(view, PeftModel) or same:
            return None
        return gated(view.composition, {**loaded.gates.values, **gates})

    def text(self, adapter: str, model: str, saved: Mapping[str, float], gates: Mapping[str, float]) -> str:
        """What these gates make active, as text.

        Of a model that is not loaded (any more) as a plain sum; empty where it has no gates either.
        """
        loaded = self._loaded if self._key == (adapter.strip(), model.strip()) else None
        if loaded is not None:
            node = self.composition(loaded, gates)
            return loaded.gates.saved if node is None else shown(node)
        return shown(gated(Sum(*saved), gates)) if saved else ""

    def answers(
        self, adapter: str, model: str, turns: Sequence[tuple[str, str]], question: str, how: Asked
    ) -> Iterator[tuple[bool, str]]:
        """(whether it is the base's, the answer so far), as it comes: the adapted one, then, to compare, the base's.

        Raises:
            ValueError: the question does not fit, or the model cannot be loaded.
        """
        said: queue.Queue[tuple[bool, str] | Exception | None] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            # All in one thread, in which the composition is active; who listens may do so from several.
            try:
                with self._lock:
                    self._answer(self._load(adapter, model), turns, question, how, said, stop)
                said.put(None)
            except Exception as error:
                said.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (item := said.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()

    def _answer(
        self,
        loaded: Loaded,
        turns: Sequence[tuple[str, str]],
        question: str,
        how: Asked,
        said: "queue.Queue[tuple[bool, str] | Exception | None]",
        stop: threading.Event,
    ) -> None:
        view = loaded.ready.model
        chat = Chat(loaded.ready, max_new_tokens=how.max_new_tokens, temperature=how.temperature)
        chat.turns = [Turn(question=q, answer=a) for q, a in turns]
        node = self.composition(loaded, how.gates)
        for base in (False, True) if how.compare and isinstance(view, PeftModel) else (False,):
            with self._active(view, Sum() if base else node):
                request = chat.request(question)
                text = ""

                def hear(piece: str, base: bool = base) -> None:
                    nonlocal text
                    text += piece
                    said.put((base, text))

                answer = chat.answer(request, hear, stopped=stop.is_set)
            said.put((base, answer))

    def _active(self, view: Any, node: Node | None) -> AbstractContextManager[Any]:
        return nullcontext() if node is None or not isinstance(view, PeftModel) else view.using(node)
