"""What stands before every route: who may ask, what is counted, and whether anything new is taken."""

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coadapt.serving.errors import Refusal
from coadapt.serving.metrics import Metrics
from coadapt.serving.rows import STOPPING

OPEN = "/health"
"""The path that needs no key."""


class State:
    """What the server is doing; written on its event loop only."""

    def __init__(self) -> None:
        self.stopping = False
        self.running = 0
        """Requests that are being answered."""


class Gate:
    """An ASGI middleware.

    Args:
        app: what it stands before.
        key: what clients must send; None: nothing, and then only by a name of this machine's own.
        endpoints: paths whose requests are counted by name; others are counted together.
    """

    def __init__(self, app: ASGIApp, *, state: State, metrics: Metrics, key: str | None, endpoints: set[str]) -> None:
        self.app, self.state, self.metrics, self.key, self.endpoints = app, state, metrics, key, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, answered = str(scope["path"]), 0

        async def hear(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = int(message["status"])
            await send(message)

        self.state.running += 1
        try:
            if (refusal := self._refused(scope, path)) is not None:
                await refusal.response()(scope, receive, hear)
            else:
                await self.app(scope, receive, hear)
        finally:
            self.state.running -= 1
            endpoint = path if path in self.endpoints else "other"
            self.metrics.requests.labels(endpoint, str(answered or 499)).inc()

    def _refused(self, scope: Scope, path: str) -> Refusal | None:
        headers = Headers(scope=scope)
        if self.key is None and not _is_here(headers.get("host", "")):
            # A page in a browser can have a name of its own lead here. It cannot send another name.
            message = "This server has no key, so it answers on this machine only, as localhost or 127.0.0.1."
            return Refusal(403, message, code="unknown_host")
        if self.key is not None and path != OPEN and not _same(headers.get("authorization", ""), self.key):
            message = "This server wants its key: Authorization: Bearer KEY."
            return Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self.state.stopping and (path == OPEN or scope["method"] == "POST"):
            return Refusal(503, STOPPING, code="stopping", headers={"connection": "close"})
        return None


def _is_here(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _same(authorization: str, key: str) -> bool:
    kind, _, sent = authorization.partition(" ")
    return hmac.compare_digest(sent.strip().encode(), key.encode()) and kind.lower() == "bearer"
