"""Adapters by name, in their folders; those that are in use, and that were last, are attached to the model."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from coadapt.config import did_you_mean
from coadapt.core.composition import Node, Seq, Sum, as_node, names, trained_gates
from coadapt.formats.folder import Loaded
from coadapt.model import PeftModel
from coadapt.naming import check_name


@dataclass(eq=False)
class Entry:
    """A name, and what is known of it."""

    name: str
    folder: Path | None
    """None: it was attached to the model before, and stays."""
    node: Node = None
    """What it is in the model, while it is attached: a folder can hold several adapters."""
    inside: list[str] = field(default_factory=list)
    """Their names there."""
    asked: int = 0
    """Requests that are not done and named it: until then it can be attached again."""
    users: int = 0
    """Requests that it is kept for: until then it is not taken away."""
    coming: "Future[Loaded] | None" = None
    """While it is read."""
    error: str | None = None
    withdrawn: bool = False

    @property
    def attached(self) -> bool:
        return self.node is not None


class Shelf:
    """Names and folders. Only the thread that calls the model may `take`, `settle`, `resolve` and `give_back`.

    Args:
        view: its adapters stay; others are attached beside them.
        loaded: so many folders are attached at a time, at most.
    """

    def __init__(self, view: PeftModel, loaded: int) -> None:
        if loaded < 1:
            raise ValueError(f"loaded={loaded}: at least one adapter must have room beside the model.")
        self.view, self.loaded = view, loaded
        self.lock = threading.RLock()
        self._reading = threading.Lock()
        self._known = {n: Entry(n, None, node=n, inside=[n]) for n in view.peft_config}
        self._going: list[Entry] = []
        """Withdrawn, and in use still."""
        self._attached: list[Entry] = []
        """Those from folders; the least recently used first."""
        self._reader = ThreadPoolExecutor(1, "adapters")
        self.loads = self.evictions = self.changes = 0

    # ---- on any thread -----------------------------------------------------------------------------------------------

    @property
    def known(self) -> dict[str, Path | None]:
        """All names that can be asked for, and their folders."""
        with self.lock:
            return {name: entry.folder for name, entry in self._known.items()}

    @property
    def attached(self) -> list[str]:
        """The names that are attached to the model."""
        with self.lock:
            return [name for name, entry in self._known.items() if entry.attached]

    def offer(self, name: str, folder: Path) -> Entry:
        """From now on there is such an adapter. It is read when somebody asks for it.

        Raises:
            ValueError: there is one of that name, or it cannot be a name.
            FileNotFoundError: there is no such folder.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no adapter folder {str(folder)!r}.")
        with self.lock:
            self.check_new(name)
            self._known[name] = Entry(name, folder)
            return self._known[name]

    def check_new(self, name: str) -> None:
        """Raises ValueError where this cannot be a further adapter's name."""
        if check_name(name) in self.known:
            raise ValueError(f"There is an adapter {name!r} already. Unload it first, or take another name.")

    def withdraw(self, name: str) -> None:
        """From now on there is none of that name; who uses it already goes on using it.

        Raises:
            ValueError: there is none, or it came with the model.
        """
        with self.lock:
            if self.check([name])[0].folder is None:
                raise ValueError(f"{name!r} came with the model, and stays.")
            entry = self._known.pop(name)
            entry.withdrawn = True
            self._going.append(entry)

    def check(self, wanted: Iterable[str]) -> list[Entry]:
        """The entries of these names. Raises ValueError for one that there is not."""
        with self.lock:
            for name in wanted:
                if name not in self._known:
                    there = ", ".join(self._known) or "none"
                    hint = did_you_mean(name, list(self._known))
                    raise ValueError(f"There is no adapter {name!r}.{hint} Known: {there}.")
            return [self._known[name] for name in wanted]

    def ask(self, adapters: str | None) -> tuple[Node, list[Entry]]:
        """A composition of known names, and their entries, which are known until they are given back.

        Raises:
            ValueError: the text is none, names what is not there, or would make gates that nothing has trained; or it
                takes more folders than are attached at a time.
        """
        with self.lock:
            node = adapters if adapters in self._known else as_node(adapters)
            if trained_gates(node):
                raise ValueError(f"{adapters!r} would make new gates, which nothing has trained. Give numbers.")
            entries = self.check(names(node))
        if (asked := sum(entry.folder is not None for entry in entries)) > self.loaded:
            raise ValueError(f"{adapters!r} takes {asked} adapters, and {self.loaded} at most are attached at a time.")
        with self.lock:
            for entry in entries:
                entry.asked += 1
        return node, entries

    def read(self, folder: Path) -> Loaded:
        """What a folder holds, attached to nothing yet."""
        with self._reading:  # two at a time would only be in each other's way
            return self.view.read(folder)

    def close(self) -> None:
        """Nothing is read any more."""
        self._reader.shutdown(cancel_futures=True)

    # ---- on the thread that calls the model --------------------------------------------------------------------------

    def take(self, entries: Sequence[Entry]) -> bool:
        """Keeps these for a user, and has those read that are not attached; False: others are in use, and none is kept.

        All or nothing: who waits for a place holds none.
        """
        with self.lock:
            missing = [e for e in entries if not e.attached and e.coming is None]
            free = self.loaded - len(self._attached) - self._on_their_way
            idle = [e for e in self._attached if not e.users and e not in entries]
            if len(missing) > free + len(idle):
                return False
            for entry in idle[: max(len(missing) - free, 0)]:
                self._detach(entry)
                self.evictions += 1
            for entry in entries:
                entry.users += 1
                if entry in self._attached:
                    self._attached.remove(entry)
                    self._attached.append(entry)
            for entry in missing:
                assert entry.folder is not None
                entry.error, entry.coming = None, self._reader.submit(self.read, entry.folder)
            return True

    @property
    def _on_their_way(self) -> int:
        return sum(e.coming is not None for e in (*self._known.values(), *self._going))

    def give_back(self, entries: Iterable[Entry], taken: bool) -> None:
        """A request is done that had named these, and was kept them if `taken`."""
        with self.lock:
            for entry in entries:
                entry.asked -= 1
                entry.users -= taken

    def settle(self) -> bool:
        """Attaches what was read, and takes away what nobody can ask for any more; whether something is coming."""
        with self.lock:
            for entry in (*self._known.values(), *self._going):
                if entry.coming is not None and entry.coming.done():
                    coming, entry.coming = entry.coming, None
                    try:
                        self.attach(entry, coming.result())
                    except Exception as error:  # whatever a broken folder leads to is told to who asked for it
                        entry.error = f"The adapter {entry.name!r} cannot be loaded: {error}"
            for entry in [e for e in self._going if not e.asked and e.coming is None]:
                self._detach(entry)
                self._going.remove(entry)
            return self._on_their_way > 0

    def make_room(self) -> bool:
        """Whether one more can be attached; the least recently used goes for it, if nobody uses it."""
        with self.lock:
            if len(self._attached) + self._on_their_way < self.loaded:
                return True
            idle = next((e for e in self._attached if not e.users), None)
            if idle is None:
                return False
            self._detach(idle)
            self.evictions += 1
            return True

    def attach(self, entry: Entry, found: Loaded) -> None:
        """Puts what was read beside the model, under names that are free there."""
        taken = set(self.view.peft_config)
        single = len(found.adapters) == 1
        called: dict[str, str] = {}
        for adapter in found.adapters:
            wanted = entry.name if single else f"{entry.name}.{adapter.name}"
            called[adapter.name] = _free(wanted, taken)
            taken.add(called[adapter.name])
        for adapter in found.adapters:
            adapter.name = called[adapter.name]
        self.view.take_in(found)
        with self.lock:
            entry.inside = list(called.values())
            entry.node = _replaced(found.node, called)
            self._attached.append(entry)
            self.loads += 1

    def _detach(self, entry: Entry) -> None:
        if not entry.attached:
            return
        for name in entry.inside:
            self.view.delete_adapter(name)
        entry.node, entry.inside = None, []
        self._attached.remove(entry)
        self.changes += 1

    def resolve(self, node: Node, entries: Sequence[Entry]) -> Node:
        """A composition of known names as one of the model's adapters, all of which are attached."""
        return _replaced(node, {entry.name: entry.node for entry in entries})


def _free(wanted: str, taken: set[str]) -> str:
    return next(n for n in (wanted, *(f"{wanted}.{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _replaced(node: Node, by: Mapping[str, Node]) -> Node:
    if isinstance(node, str):
        return by[node]
    children = [_replaced(child, by) for child in node.children]
    return Seq(*children) if isinstance(node, Seq) else Sum(*children, weights=node.router or node.weights)
