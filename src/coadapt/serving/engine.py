"""The engine: requests come in at any time, and each running one gets a token in each step."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import PreTrainedTokenizerBase

from coadapt.core.composition import key
from coadapt.data.tokens import end_tokens
from coadapt.model import PeftModel

from .batch import Row
from .checks import check, check_length
from .request import Finish, Hear, Request
from .sampling import Numbers
from .served import Model, Served, served
from .shelf import Shelf
from .stats import Stats
from .text import Spelling, backend
from .writing import PREFILL, Writer

_log = logging.getLogger(__name__)


class QueueFull(RuntimeError):
    """As many requests run and wait as may."""


class Stopping(RuntimeError):
    """The engine takes no more requests."""


class Ticket:
    """A request that was taken."""

    def __init__(self, engine: "Engine", row: Row) -> None:
        self._engine, self._row = engine, row

    def cancel(self) -> None:
        """Its row leaves the batch at the next step, and it hears a last piece, "cancelled"."""
        self._row.cancelled = True
        self._engine.wake()


class Engine:
    """One model, its adapters, and rows that come and go.

    Args:
        view: may have adapters already, which stay.
        rows: the largest running batch.
        queue: requests that may wait for a row.
        tokens: prompt and answer of one request at most; None: what the model has positions for.
        seed: of requests without one.
        loaded: folders of adapters that are attached at a time.

    Raises:
        ValueError: rows of this model cannot come and go, or a number is out of range.
    """

    def __init__(
        self,
        view: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int = 32,
        queue: int = 256,
        tokens: int | None = None,
        seed: int = 0,
        loaded: int = 32,
    ) -> None:
        if rows < 1 or queue < 0 or (tokens is not None and tokens < 2):
            raise ValueError(f"rows={rows}, queue={queue}, tokens={tokens}: rows >= 1, queue >= 0, tokens >= 2.")
        self.model, self.shelf = Model.of(view, tokenizer), Shelf(view, loaded)
        if tokens is not None and self.model.positions is not None and tokens > self.model.positions:
            raise ValueError(
                f"tokens={tokens}: the model takes {self.model.positions} at most. Leave it out for so many."
            )
        self.queue, self.tokens = queue, tokens
        base: Any = view.get_base_model()
        view.eval()
        self._vocabulary = len(base.get_input_embeddings().weight)
        self._backend = backend(tokenizer)
        ends = frozenset(end_tokens(base.generation_config.eos_token_id, tokenizer) or ())
        self._seeds = torch.Generator().manual_seed(seed)
        self.writer = Writer(self.model, ends, rows, self._gone)
        self._waiting: deque[Row] = deque()
        self._orders: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._served: dict[Any, Served] = {}
        self._changes = 0
        self._changed = threading.Condition()
        self._stopping = self._ending = False
        self._thread: threading.Thread | None = None
        self._done: Counter[Finish] = Counter()

    # ---- on any thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine's thread."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, hear: Hear) -> Ticket:
        """Takes a request; what comes of it is heard on the engine's thread.

        Raises:
            ValueError: it asks for what there is not, or is too long.
            QueueFull: too many are waiting.
            Stopping: the engine is stopping. In each case nothing has happened.
        """
        check(request, self._vocabulary, self.tokens, self.model.positions)
        with self._changed:
            if self._stopping:
                raise Stopping("The server is stopping and takes no more requests.")
            running = len(self.writer.rows)
            if running + len(self._waiting) >= self.writer.most + self.queue:
                raise QueueFull(f"{running} requests run and {len(self._waiting)} wait; try again later.")
            node, entries = self.shelf.ask(request.adapters)
            seed = int(torch.randint(2**62, (), generator=self._seeds)) if request.seed is None else request.seed
            spelling = Spelling(self._backend, request.tokens, request.stop)
            row = Row(request=request, hear=hear, entries=entries, numbers=Numbers(seed), spelling=spelling, node=node)
            self._waiting.append(row)
            self._changed.notify()
        return Ticket(self, row)

    def offer(self, name: str, folder: Path) -> None:
        """From now on there is such an adapter; it is read when somebody asks for it. Raises as `Shelf.offer`."""
        self.shelf.offer(name, folder)

    def load(self, name: str, folder: Path) -> None:
        """As `offer`, and reads it now: here, beside the steps. It is attached between two of them, if there is room.

        Raises:
            FileNotFoundError, ValueError: as `PeftModel.from_pretrained`, or there is an adapter of that name. Nothing
                has changed then.
        """
        self.shelf.check_new(name)
        found = self.shelf.read(folder)

        def attach() -> None:
            entry = self.shelf.offer(name, folder)
            if self.shelf.make_room():
                self.shelf.attach(entry, found)

        self._ordered(attach)

    def unload(self, name: str) -> None:
        """No request can ask for it any more, from now on. Those that did finish with it; then it leaves the memory.

        Raises:
            ValueError: there is none of that name, or it came with the model.
        """
        self.shelf.withdraw(name)
        self.wake()

    def stop(self, *, finish: bool = True) -> None:
        """Takes no more requests, and returns when there are none left: finished, or cancelled."""
        with self._changed:
            self._stopping, self._ending = True, self._ending or not finish
            self._changed.notify()
        if self._thread is None:
            for row in list(self._waiting):
                self._refuse(row, "cancelled")
        elif self._thread is not threading.current_thread():
            self._thread.join()
        self.shelf.close()

    @property
    def stats(self) -> Stats:
        """As of now."""
        writer = self.writer
        with self._changed:
            return Stats(
                running=len(writer.rows),
                waiting=len(self._waiting),
                prompt_tokens=writer.prompt_tokens,
                answer_tokens=writer.answer_tokens,
                steps=writer.steps,
                rows_per_step=writer.stepped / max(writer.steps, 1),
                finished={how: self._done[how] for how in get_args(Finish)},
                known=len(self.shelf.known),
                attached=tuple(self.shelf.attached),
                loads=self.shelf.loads,
                evictions=self.shelf.evictions,
            )

    def wake(self) -> None:
        """Has the engine look at what has changed."""
        with self._changed:
            self._changed.notify()

    def _ordered(self, do: Callable[[], None]) -> None:
        """Has something done between two steps, and waits for it."""
        if self._thread is None or not self._thread.is_alive():
            do()
            return
        done: Future[None] = Future()
        with self._changed:
            self._orders.append((do, done))
            self._changed.notify()
        done.result()

    # ---- on the engine's thread --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            coming = self._between()
            with self._changed:
                if not self.writer.rows:
                    if self._stopping and not self._waiting:
                        break
                    if not self._orders:
                        self._changed.wait(0.005 if coming or self._waiting else None)
                    continue
            try:
                self.writer.turn()
            except Exception:  # not a row's fault, but ours: nobody shall wait for what never comes
                _log.exception("A step failed.")
                self.writer.give_up()
        self._between()

    def _between(self) -> bool:
        """What is done between two steps; whether adapters are being read."""
        with self._changed:
            orders, self._orders = self._orders, deque()
        for do, done in orders:
            try:
                do()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)
        coming = self.shelf.settle()
        self._forget()
        if self._ending:  # here, for within a turn a row can be on its way from one list to another
            for row in (*self._waiting, *self.writer.rows):
                row.cancelled = True
        for row in [row for row in self._waiting if row.cancelled]:
            self._refuse(row, "cancelled")
        if self.writer.filling is None and len(self.writer.batch.rows) < self.writer.most:
            self._admit()
            self._forget()
        return coming

    def _forget(self) -> None:
        """After an adapter has gone: its name may be another one's now."""
        if self.shelf.changes != self._changes:
            self._changes = self.shelf.changes
            self._served.clear()
            self.writer.batch.forget()

    def _admit(self) -> None:
        """Lets waiting requests in, the oldest first: so many as are read at once."""
        group: list[Row] = []
        longest = 0
        for row in list(self._waiting):
            if len(self.writer.batch.rows) + len(group) == self.writer.most:
                break
            if not row.taken:
                row.taken = self.shelf.take(row.entries)
            if not row.taken:
                break  # or those that came later would keep it from ever finding a place
            if (why := next((e.error for e in row.entries if e.error), None)) is not None:
                self._refuse(row, "error", why)
            elif all(e.attached for e in row.entries) and self._prepared(row):
                longest = max(longest, len(row.request.tokens))
                if group and longest * (len(group) + 1) > PREFILL:
                    break
                group.append(row)
        if group:
            with self._changed:
                for row in group:
                    self._waiting.remove(row)
                self.writer.begin(group)

    def _prepared(self, row: Row) -> bool:
        """Finds out what its composition needs; where it cannot be served, the row is told."""
        if row.served is not None:
            return True
        try:
            node = self.shelf.resolve(row.node, row.entries)
            found = self._served.get(key(node))
            if found is None:
                found = self._served[key(node)] = served(self.model, node)
            check_length(row.request, self.model.positions, "the model takes", found.takes)
        except Exception as error:
            how = "refused" if isinstance(error, ValueError) else "error"
            self._refuse(row, how, str(error) or type(error).__name__)
            return False
        row.served = found
        return True

    def _refuse(self, row: Row, how: Finish, error: str | None = None) -> None:
        """Ends what waits."""
        with self._changed:
            self._waiting.remove(row)
        self.writer.finish(row, how, error=error)

    def _gone(self, row: Row, how: Finish) -> None:
        self.shelf.give_back(row.entries, row.taken)
        self._done[how] += 1
