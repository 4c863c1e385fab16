"""The routes: from HTTP to rows of the engine, and back."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Call
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect
from transformers import PreTrainedTokenizerBase

from coadapt.model import PeftModel
from coadapt.serving import errors, prompts
from coadapt.serving.answers import Answer, ChatAnswer, CompletionAnswer
from coadapt.serving.catalog import Catalog, Choice
from coadapt.serving.engine import Engine
from coadapt.serving.errors import Refusal
from coadapt.serving.gate import Gate, State
from coadapt.serving.limits import Limits
from coadapt.serving.metrics import Metrics
from coadapt.serving.request import Piece, Request
from coadapt.serving.rows import Rows
from coadapt.serving.schemas import Chat, Completion, Load, Sampling, Unload, read

log = logging.getLogger(__name__)
CLOSE = {"connection": "close"}
DRAINING = 1.0
"""Seconds for which a body that is too large is read, and kept nowhere: many clients hear nothing while they send."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Everything that a request can reach."""

    view: PeftModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    catalog: Catalog
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    state: State = field(default_factory=State)
    key: str | None = None

    def room(self, choice: Choice) -> int | None:
        """Tokens of prompt and answer together, beside virtual ones; None where nobody says."""
        whole = self.engine.model.positions
        limits = [whole - choice.virtual] if whole is not None else []
        limits += [self.engine.tokens] if self.engine.tokens is not None else []
        return min(limits, default=None)


def build(serving: Serving) -> FastAPI:
    """The application."""
    # No pages about itself: those of FastAPI's load scripts from elsewhere.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    _add_models(app, serving)
    _add_questions(app, serving)
    _add_looks(app, serving)
    endpoints = {path.split(" ", 1)[1] for path in errors.paths(app) if "{" not in path}
    app.add_middleware(Gate, state=serving.state, metrics=serving.metrics, key=serving.key, endpoints=endpoints)
    return app


def _add_looks(app: FastAPI, serving: Serving) -> None:
    serving.metrics.watch(lambda: serving.engine.stats)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_models(app: FastAPI, serving: Serving) -> None:
    catalog = serving.catalog

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": catalog.cards()})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        found = next((card for card in catalog.cards() if card["id"] == name), None)
        if found is None:
            catalog.find(name)  # says what is there instead
            raise Refusal(404, f"{name!r} can be asked, and is no model of its own.", code="model_not_found")
        return JSONResponse(found)

    @app.post("/v1/load_lora_adapter")
    async def load(call: Call) -> JSONResponse:
        asked = read(Load, await _body(call, serving.limits))
        return JSONResponse(catalog.card(await catalog.add(asked.lora_name, asked.lora_path)))

    @app.post("/v1/unload_lora_adapter")
    async def unload(call: Call) -> JSONResponse:
        asked = read(Unload, await _body(call, serving.limits))
        await catalog.remove(asked.lora_name)
        return JSONResponse({"id": asked.lora_name, "object": "model", "deleted": True})


def _add_questions(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/chat/completions")
    async def chat(call: Call) -> Response:
        asked = read(Chat, await _body(call, serving.limits))
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refusal(
                400, "top_logprobs has no effect without logprobs: true.", param="top_logprobs", code="invalid_value"
            )
        serving.limits.check_choices(1, asked.n)
        choice = serving.catalog.find(asked.model)
        tokens = await asyncio.to_thread(
            prompts.of_conversation, asked.messages, serving.tokenizer, choice.framing, asked.model
        )
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        return await _answered(serving, call, asked, choice, [tokens], top, ChatAnswer)

    @app.post("/v1/completions")
    async def completions(call: Call) -> Response:
        asked = read(Completion, await _body(call, serving.limits))
        each = prompts.prompts(asked.prompt)
        serving.limits.check_choices(len(each), asked.n)
        choice = serving.catalog.find(asked.model)
        tokens = await asyncio.to_thread(_all_tokens, each, serving)
        return await _answered(serving, call, asked, choice, tokens, asked.logprobs, CompletionAnswer)


def _all_tokens(each: Sequence[str | list[int]], serving: Serving) -> list[tuple[int, ...]]:
    vocabulary = int(serving.view.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    return [
        prompts.of_text(one, serving.tokenizer) if isinstance(one, str) else prompts.of_tokens(one, vocabulary)
        for one in each
    ]


async def _body(call: Call, limits: Limits) -> bytes:
    """The body, no more of it than is allowed. Raises Refusal where it is too large, too slow, or not called JSON."""
    kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site can send without asking first
        message = f"The body must be JSON, and say so (content-type: application/json; found: {kind or 'none'})."
        raise Refusal(415, message, code="invalid_content_type")
    found, large = bytearray(), int(call.headers.get("content-length") or 0) > limits.body
    try:
        async with asyncio.timeout(DRAINING if large else limits.body_seconds) as until:
            async for part in call.stream():
                found += b"" if large else part
                if not large and len(found) > limits.body:
                    large = True
                    until.reschedule(asyncio.get_running_loop().time() + DRAINING)
    except TimeoutError:
        if not large:
            message = f"The body did not come within {limits.body_seconds:g} seconds."
            raise Refusal(408, message, code="timeout", headers=CLOSE) from None
    except ClientDisconnect:
        raise Refusal(400, "The body is not whole.", code="invalid_json") from None
    if large:
        message = f"The body has more than {limits.body} bytes, the most that this server takes."
        raise Refusal(413, message, code="body_too_large", headers=CLOSE)
    return bytes(found)


async def _answered(
    serving: Serving,
    call: Call,
    asked: Sampling,
    choice: Choice,
    prompts: Sequence[tuple[int, ...]],
    top: int | None,
    kind: Callable[..., Answer],
) -> Response:
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(
            400, "stream_options has no effect without stream: true.", param="stream_options", code="invalid_value"
        )
    answer = kind(
        asked.model,
        serving.tokenizer,
        prompt_tokens=sum(map(len, prompts)),
        choices=len(prompts) * asked.n,
        usage=asked.stream_options is not None and asked.stream_options.include_usage,
    )
    rows = Rows(serving.engine, _requests(serving, asked, choice, prompts, top), serving.metrics)
    if asked.stream:
        return Stream(rows, answer)
    try:
        return await _whole(call, rows, answer)
    finally:
        rows.cancel()


def _requests(
    serving: Serving, asked: Sampling, choice: Choice, prompts: Sequence[tuple[int, ...]], top: int | None
) -> list[Request]:
    room = serving.room(choice)
    return [
        Request(
            tokens=tokens,
            adapters=choice.text,
            max_tokens=serving.limits.answer(asked, len(tokens), room),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=max(asked.top_k, 0),
            seed=None if asked.seed is None else asked.seed + number,
            stop=asked.stops,
            logprobs=top,
        )
        for tokens in prompts
        for number in range(asked.n)
    ]


async def _whole(call: Call, rows: Rows, answer: Answer) -> Response:
    """All of it at once, unless the client goes away before."""

    async def collect() -> list[list[Piece]]:
        said: list[list[Piece]] = [[] for _ in rows.tickets]
        async for number, piece in rows.pieces():
            said[number].append(piece)
        return said

    async def gone() -> None:
        while (await call.receive())["type"] != "http.disconnect":
            pass

    collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return JSONResponse(answer.whole(collecting.result()))
        return Response(status_code=499)  # nobody reads it
    finally:
        collecting.cancel()
        leaving.cancel()


class Stream(StreamingResponse):
    """Server-sent events; whatever ends it, the rows are freed."""

    def __init__(self, rows: Rows, answer: Answer) -> None:
        super().__init__(self._events(rows, answer), media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self.rows = rows

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.rows.cancel()

    async def _events(self, rows: Rows, answer: Answer) -> AsyncIterator[str]:
        try:
            async for number, piece in rows.pieces():
                if piece.text or piece.finish or piece.chosen:
                    yield _event(answer.chunk(number, piece))
            if answer.usage:
                yield _event(answer.last())
            yield "data: [DONE]\n\n"
        except Refusal as refusal:  # the status is sent already
            yield _event(refusal.body)
        except Exception:
            log.exception("A stream broke off.")
            yield _event(errors.broken().body)


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
