"""The models that a client can name: the base, adapters, and what can be written with these."""

import asyncio
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from coadapt.config import did_you_mean
from coadapt.core.composition import Node, as_node, names, trained_gates
from coadapt.data.segments import Framing
from coadapt.formats.facts import read_facts
from coadapt.formats.files import COMPOSITION, CONFIG
from coadapt.naming import check_name
from coadapt.serving.engine import Engine
from coadapt.serving.errors import Refusal
from coadapt.training.load import framing_of

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
NO_NAME = "letters, digits, _, - and ., at most 96 of them, and no - or . in front"
LARGEST = 1000.0
"""The largest weight of an adapter in a composition that a client writes."""
SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An adapter folder and its name; several adapters in one folder are one, as they were active when it was saved."""

    name: str
    folder: Path
    framing: Framing | None = None
    """How prompts were put to it in training, where that is known."""
    virtual: int = 0
    """Positions that its virtual tokens take."""
    given: bool = False
    """It was named at the start, and clients cannot take it away."""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def read(cls, name: str, folder: Path, *, given: bool = False) -> "Entry":
        """Reads settings only. Raises FileNotFoundError or ValueError where the folder holds no adapter."""
        virtual = sum(int(facts.config.get("num_virtual_tokens") or 0) for facts in read_facts(folder).adapters)
        framing = framing_of(folder) or framing_of(folder.parent)  # of what it is a part of
        return cls(name=name, folder=folder, framing=framing, virtual=virtual, given=given)


def holds_adapter(folder: Path) -> bool:
    """Whether a folder looks like one with adapters."""
    return (folder / CONFIG).is_file() or (folder / COMPOSITION).is_file()


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What answers a request."""

    text: str | None
    """As a `Request` has it."""
    framing: Framing | None
    virtual: int = 0


class Catalog:
    """Names -> folders. All of it runs on the server's event loop.

    Args:
        base: what clients call the base alone.
        root: where the base lies, or its hub id.
        framing: of the base, where it is one that adapters were merged into.
        entries: what there is at the start; the engine knows them already.
        adapters_dir: the only folder that clients can load from; None: they cannot load.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        base: str,
        root: str,
        framing: Framing | None = None,
        entries: Iterable[Entry] = (),
        adapters_dir: Path | None = None,
    ) -> None:
        self.engine, self.base, self.root, self.framing = engine, base, root, framing
        self.entries = {entry.name: entry for entry in entries}
        self.adapters_dir = adapters_dir
        self._created = int(time.time())

    # ---- looking up --------------------------------------------------------------------------------------------------

    def find(self, asked: str) -> Choice:
        """What a client means by `model`. Raises Refusal where there is nothing of that name."""
        if asked == self.base:
            return Choice(text=None, framing=self.framing)
        if (entry := self.entries.get(asked)) is not None:
            return Choice(text=asked, framing=entry.framing, virtual=entry.virtual)
        node = self._node(asked)
        if self.base in names(node):
            raise _no_composition(f"{self.base!r} in {asked!r} is the base, on which adapters stand: leave it out.")
        if unknown := [name for name in names(node) if name not in self.entries]:
            raise self._unknown(unknown[0])
        if trained_gates(node):
            raise _no_composition(f"{asked!r} has gates or a router that nothing has trained. Give numbers.")
        if [weight for weight in _weights(node) if not isfinite(weight) or abs(weight) > LARGEST]:
            raise _no_composition(f"a weight in {asked!r} is not between -{LARGEST:g} and {LARGEST:g}.")
        parts = [self.entries[name] for name in names(node)]
        framings = [entry.framing for entry in parts if entry.framing is not None]
        virtual = sum(entry.virtual for entry in parts)
        return Choice(text=asked, framing=framings[0] if framings else self.framing, virtual=virtual)

    def _node(self, asked: str) -> Node:
        try:
            return as_node(asked)
        except RecursionError:
            raise _no_composition(f"{asked[:32]!r}… is nested too deeply.") from None
        except (ValueError, TypeError) as error:
            if NAME.fullmatch(asked) or "/" in asked:
                raise self._unknown(asked) from None
            raise _no_composition(str(error)) from None

    def _unknown(self, name: str) -> Refusal:
        known = [self.base, *self.entries]
        more = ", …" if len(known) > SHOWN else ""
        hint = did_you_mean(name, known) or f" There are: {', '.join(known[:SHOWN])}{more}."
        return Refusal(404, f"There is no model {name!r}.{hint}", param="model", code="model_not_found")

    def cards(self) -> list[dict[str, Any]]:
        """As GET /v1/models tells them."""
        own = {"object": "model", "created": self._created, "owned_by": "coadapt"}
        base = {"id": self.base, **own, "root": self.root, "parent": None}
        return [base, *(self.card(entry) for entry in self.entries.values())]

    def card(self, entry: Entry) -> dict[str, Any]:
        """One adapter, as GET /v1/models tells it."""
        own = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "coadapt"}
        return {**own, "root": str(entry.folder.resolve()), "parent": self.base}

    # ---- what clients change -----------------------------------------------------------------------------------------

    async def add(self, name: str, path: str) -> Entry:
        """Gives an adapter folder a name, and loads it. Raises Refusal where it must not be, or does not fit."""
        folder = self._inside(path)
        if not NAME.fullmatch(name):
            message = f"lora_name: {name[:96]!r} is no name for an adapter: {NO_NAME}."
            raise Refusal(400, message, param="lora_name", code="invalid_value")
        try:
            check_name(name)
        except ValueError as error:
            raise Refusal(400, f"lora_name: {error}", param="lora_name", code="invalid_value") from error
        if name == self.base or name in self.entries:
            message = f"lora_name: there is a model {name!r} already. Unload it first, or pick another name."
            raise Refusal(400, message, param="lora_name", code="model_exists")
        try:
            entry = Entry.read(name, folder)
            await asyncio.to_thread(self.engine.load, name, folder)
        except (ValueError, OSError) as error:
            raise Refusal(400, f"lora_path: {error}", param="lora_path", code="adapter_does_not_fit") from error
        self.entries[name] = entry
        return entry

    def _inside(self, path: str) -> Path:
        """The folder, where it and all of its files lie below the one folder that clients can load from."""
        if self.adapters_dir is None:
            message = "Loading is off: the server was started without --adapters-dir, the only place to load from."
            raise Refusal(403, message, code="loading_is_off")
        root = self.adapters_dir.resolve()
        try:
            folder = (root / path).resolve(strict=True)
            inside = folder != root and folder.is_relative_to(root) and holds_adapter(folder)
            inside = inside and all(file.resolve().is_relative_to(root) for file in folder.rglob("*"))
        except (OSError, ValueError, RuntimeError):  # none there, a zero byte, links in a circle
            inside = False
        if not inside:  # what there is elsewhere is nobody's business
            message = f"lora_path: there is no adapter folder {path[:256]!r} below the server's --adapters-dir."
            raise Refusal(404, message, param="lora_path", code="adapter_not_found")
        return folder

    async def remove(self, name: str) -> None:
        """Takes a name away; requests that named it already are still answered. Raises Refusal where it must stay."""
        if self.adapters_dir is None:
            message = "Unloading is off, as loading is: the server was started without --adapters-dir."
            raise Refusal(403, message, code="loading_is_off")
        if name == self.base:
            raise Refusal(400, f"{name!r} is the base, which stays.", param="lora_name", code="model_stays")
        if (entry := self.entries.get(name)) is None:
            raise self._unknown(name[:96])
        if entry.given:
            message = f"{name!r} was named at the start (--adapter), and stays as long as the server runs."
            raise Refusal(400, message, param="lora_name", code="model_stays")
        del self.entries[name]
        self.engine.unload(name)


def _no_composition(why: str) -> Refusal:
    return Refusal(400, f"model: {why}", param="model", code="invalid_composition")


def _weights(node: Node) -> list[float]:
    if isinstance(node, str):
        return []
    own = [float(weight) for weight in getattr(node, "weights", ()) if isinstance(weight, int | float)]
    return own + [weight for child in node.children for weight in _weights(child)]
