"""The rows of one HTTP request in the engine, and what they say, on the server's event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from coadapt.serving.engine import Engine, QueueFull, Stopping, Ticket
from coadapt.serving.errors import Refusal, broken
from coadapt.serving.metrics import Metrics
from coadapt.serving.request import Piece, Request

STOPPING = "The server is stopping, and takes no new requests."


class Rows:
    """Puts all requests to the engine, or none of them.

    Raises:
        Refusal: the engine does not take them.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], metrics: Metrics) -> None:
        self.metrics = metrics
        self.tickets: list[Ticket] = []
        self.tokens = [0] * len(requests)
        self._loop, self._heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()
        self._began, self._first = time.monotonic(), [0.0] * len(requests)
        try:
            for number, request in enumerate(requests):
                self.tickets.append(engine.submit(request, partial(self._hear, number)))
        except BaseException as error:
            self.cancel()
            raise _refusal(error) from error
        self.metrics.prompt_tokens.inc(sum(len(request.tokens) for request in requests))

    def _hear(self, number: int, piece: Piece) -> None:
        """On the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._heard.put_nowait, (number, piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Which row says what, until all have ended. Raises Refusal where one could not go on."""
        left = len(self.tickets)
        while left:
            number, piece = await self._heard.get()
            self._count(number, piece)
            if piece.finish == "refused":
                raise Refusal(400, piece.error or "", param="model", code="cannot_be_served")
            if piece.finish == "error":
                raise broken(piece.error)
            if piece.finish == "cancelled":
                raise Refusal(503, "The server stopped before the answer was whole.", code="stopped")
            left -= piece.finish is not None
            yield number, piece

    def _count(self, number: int, piece: Piece) -> None:
        now, before = time.monotonic(), self.tokens[number]
        self.metrics.answer_tokens.inc(piece.tokens - before)
        self.tokens[number] = piece.tokens
        if piece.tokens and not before:
            self._first[number] = now
            self.metrics.first.observe(now - self._began)
        if piece.finish in ("stop", "length") and piece.tokens > 1 and now > self._first[number]:
            self.metrics.each.observe((now - self._first[number]) / (piece.tokens - 1))

    def cancel(self) -> None:
        """Frees all rows; those that have ended are none any more."""
        for ticket in self.tickets:
            ticket.cancel()


def _refusal(error: BaseException) -> BaseException:
    match error:
        case QueueFull():
            return Refusal(429, f"{error} Ask again soon.", code="queue_full")
        case Stopping():
            return Refusal(503, STOPPING, code="stopping")
        case ValueError():
            return Refusal(400, str(error), code="invalid_value")
        case _:
            return error
