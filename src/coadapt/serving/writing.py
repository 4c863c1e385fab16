"""What happens in a step: prompts are read, each running row gets a token, and is told of it."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Filling, Row
from .request import Chosen, Finish, Piece
from .sampling import BROKEN, Ways
from .served import Model

PREFILL = 512
"""Prompt tokens that are read between two steps, at most: so long do running rows wait."""
_log = logging.getLogger(__name__)


class Writer:
    """The running batch, and the prompts that are being read for it. On one thread.

    Args:
        ends: tokens that end an answer.
        most: rows of one call.
        done: is told of each row that has heard its last piece.
    """

    def __init__(self, model: Model, ends: frozenset[int], most: int, done: Callable[[Row, Finish], None]) -> None:
        self.model, self.ends, self.most, self._done = model, ends, most, done
        self.batch = Batch(model)
        self.filling: Filling | None = None
        self._once = most
        """Rows of one call: fewer after memory was not enough, until the batch is empty."""
        self.prompt_tokens = self.answer_tokens = self.steps = self.stepped = 0

    @property
    def rows(self) -> list[Row]:
        """All that are on their way here."""
        filling = self.filling  # other threads count them, too
        return [*(filling.rows if filling else ()), *self.batch.rows]

    def begin(self, rows: Sequence[Row]) -> None:
        """Rows whose prompts are to be read."""
        assert self.filling is None
        self.filling = Filling(self.model, rows)

    def turn(self) -> None:
        """Reads on in the prompts, and gives each running row its next token."""
        self._drop()
        if self.filling is not None:
            self._read(self.filling)
        if self.batch.rows:
            self._step()

    def give_up(self) -> None:
        """Ends all rows with an error, which the log tells."""
        for row in self.rows:
            self.finish(row, "error")
        self.filling, self.batch = None, Batch(self.model)

    def finish(self, row: Row, how: Finish, text: str = "", error: str | None = None) -> None:
        """The last that a row hears."""
        self._tell(row, text, how, error)
        self._done(row, how)

    # ---- the parts of a turn -----------------------------------------------------------------------------------------

    def _drop(self) -> None:
        """Takes out whose clients have gone."""
        if gone := [row for row in self.batch.rows if row.cancelled]:
            self.batch.leave(gone)
        if self.filling is not None and all(row.cancelled for row in self.filling.rows):
            gone += self.filling.rows
            self.filling = None
        for row in gone:
            self.finish(row, "cancelled")

    def _read(self, filling: Filling) -> None:
        try:
            scores = filling.read(PREFILL)
        except Exception as error:
            self._read_again(filling, error)
            return
        if scores is None:
            return
        if len(filling.rows) > 1 and not bool(scores.amax(-1).isfinite().all()):
            self._read_again(filling, None)
            return
        self.prompt_tokens += sum(len(row.request.tokens) for row in filling.rows)
        left = self._told(filling.rows, scores, Ways([row.request for row in filling.rows], scores.device))
        self.filling, rows = None, [filling.rows[i] for i in left]
        try:
            self.batch.join(rows, filling.cache, left)
        except Exception as error:  # no memory for them
            for row in rows:
                self.finish(row, "error", error=_said(error))

    def _read_again(self, filling: Filling, error: Exception | None) -> None:
        """One by one, so that a row's fault is its own."""
        self.filling = None
        rows = filling.rows
        del filling
        if len(rows) == 1 and error is not None:
            self.finish(rows[0], "error", error=_said(error))
            return
        for row in rows:
            self.filling = alone = Filling(self.model, [row])
            while self.filling is alone:
                self._read(alone)

    def _step(self) -> None:
        batch = self.batch
        if not self._settled():
            return
        rows = list(batch.rows)
        tokens = torch.tensor([[row.last] for row in rows], device=batch.device)
        scores, failed = self._scores(tokens)
        left = set(self._told(rows, scores, batch.ways, failed, tokens))
        batch.grown()
        self.steps, self.stepped = self.steps + 1, self.stepped + len(rows)
        if len(left) < len(rows):
            batch.leave([row for i, row in enumerate(rows) if i not in left])
        if not batch.rows:
            self._once = self.most

    def _settled(self) -> bool:
        """Makes room for the step, at the cost of the longest rows where there is none; whether any is left."""
        while self.batch.rows:
            try:
                self.batch.settle()
                return True
            except Exception as error:
                _is_memory(error)
                row = max(self.batch.rows, key=lambda row: len(row.request.tokens) + row.written)
                self.batch.leave([row])
                self.finish(row, "error", error=_said(error))
        return False

    def _scores(self, tokens: Tensor) -> tuple[Tensor, dict[int, str]]:
        """(B, V) for all rows; no numbers for those whose call failed, and why."""
        failed: dict[int, str] = {}
        count = len(tokens)
        if count <= self._once:
            try:
                return self.batch.next_scores(0, count, tokens), failed
            except Exception as error:
                self._once = max(count // 2, 1) if _is_memory(error) else self._once
                _log.warning("A step of %d rows failed, and is made again in parts: %s", count, _said(error))
        half = min(self._once, max(count // 2, 1))
        parts = [p for b in range(0, count, half) for p in self._parts(b, min(b + half, count), tokens, failed)]
        like = next((p for p in parts if isinstance(p, Tensor)), None)
        if like is None:
            return tokens.new_full((count, 1), torch.nan, dtype=torch.float), failed
        return torch.cat(
            [p if isinstance(p, Tensor) else like.new_full((p, like.shape[1]), torch.nan) for p in parts]
        ), (failed)

    def _parts(self, begin: int, end: int, tokens: Tensor, failed: dict[int, str]) -> Iterator[Tensor | int]:
        """The scores of these rows, or how many of them have none, from the first to the last."""
        try:
            yield self.batch.next_scores(begin, end, tokens[begin:end])
            return
        except Exception as error:
            if _is_memory(error):
                self._once = max((end - begin) // 2, 1)
            if end - begin == 1:
                failed[begin] = _said(error)
        if begin in failed and end - begin == 1:
            yield 1
            return
        middle = (begin + end) // 2
        yield from self._parts(begin, middle, tokens, failed)
        yield from self._parts(middle, end, tokens, failed)

    # ---- what rows hear ----------------------------------------------------------------------------------------------

    def _told(
        self,
        rows: Sequence[Row],
        scores: Tensor,
        ways: Ways,
        failed: dict[int, str] | None = None,
        before: Tensor | None = None,
    ) -> list[int]:
        """Chooses a token for each row and tells it; which rows go on.

        Args:
            failed: why rows have no scores.
            before: (B, 1) the tokens of this step, of the running batch.
        """
        requests, failed = [row.request for row in rows], failed or {}
        numbers = [rows[i].numbers.next() for i in ways.numbers]
        tokens = ways.choose(scores, numbers).tolist()
        if before is not None and BROKEN in tokens:
            self._again(scores, [i for i, t in enumerate(tokens) if t == BROKEN and i not in failed], before)
            tokens = ways.choose(scores, numbers).tolist()
        told: dict[int, Chosen] = ways.tell(scores, tokens, requests)
        left: list[int] = []
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token == BROKEN:
                self.finish(row, "error", error=failed.get(i, "The model gave no numbers."))
            elif self._wrote(row, token, told.get(i)):
                left.append(i)
        return left

    def _again(self, scores: Tensor, which: Sequence[int], before: Tensor) -> None:
        """Asks rows without numbers one by one: an adapter without numbers reaches all rows that a call has with it."""
        for i in which if len(before) > 1 else ():
            with contextlib.suppress(Exception):  # then it has none
                scores[i] = self.batch.next_scores(i, i + 1, before[i : i + 1])[0]

    def _wrote(self, row: Row, token: int, chosen: Chosen | None) -> bool:
        """Tells a row of its next token; whether it goes on."""
        row.last, row.written = token, row.written + 1
        self.answer_tokens += 1
        if chosen is not None:
            row.chosen.append(chosen)
        text, how = "", None
        if token in self.ends:
            text, how = row.spelling.rest(), "stop"
        else:
            text = row.spelling.add(token)
            if row.spelling.stopped:
                how = "stop"
            elif row.written >= row.request.max_tokens:
                text, how = text + row.spelling.rest(), "length"
        if how is not None:
            self.finish(row, how, text)
            return False
        if text:
            self._tell(row, text, None, None)
        return True

    @staticmethod
    def _tell(row: Row, text: str, how: Finish | None, error: str | None) -> None:
        chosen, row.chosen = tuple(row.chosen), []
        try:
            row.hear(Piece(text=text, tokens=row.written, chosen=chosen, finish=how, error=error))
        except Exception:
            _log.exception("Nobody hears an answer any more.")
            row.cancelled = True


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _is_memory(error: Any) -> bool:
    """Whether there was not enough memory; what was kept for later is then given back."""
    found = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if found and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found
