"""What a client is told when something does not work: always the same shape, with the right status."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
"""Status -> `type` of an error; every other one is an `invalid_request_error`."""
RETRY = {"retry-after": "1"}


class Refusal(Exception):
    """A request that is not served.

    Args:
        status: of the answer.
        message: what was asked, what was found, what to do.
        param: the field that it is about.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {**(RETRY if status in (429, 503) else {}), **(headers or {})}

    @property
    def body(self) -> dict[str, Any]:
        """As it is sent."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status, self.headers)


def broken(reason: str | None = None) -> Refusal:
    """A mistake of ours: what it is stands in the server's log, and is nobody else's."""
    told = reason or "The server made a mistake; what it is stands in its log."
    return Refusal(500, told, code="internal_error")


def install(app: FastAPI) -> None:
    """Has every error of `app` told in this shape."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal)
        return error.response()

    async def unknown(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _of_route(app, request, error).response()

    async def mistake(_: Request, __: Exception) -> JSONResponse:
        return broken().response()

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Exception, mistake)


def _of_route(app: FastAPI, request: Request, error: HTTPException) -> Refusal:
    """What the router found wrong."""
    asked = f"{request.method} {request.url.path}"
    match error.status_code:
        case 404:
            return Refusal(404, f"There is no {asked}. There are: {', '.join(paths(app))}.", code="unknown_path")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"There is no {asked}; this path takes {allowed or 'another method'}."
            return Refusal(405, message, code="method_not_allowed", headers=error.headers)
        case status:
            return Refusal(status, str(error.detail), headers=error.headers)


def paths(app: FastAPI) -> list[str]:
    """What `app` answers to, as `GET /health`."""
    found = [(str(getattr(route, "path", "")), getattr(route, "methods", None) or ()) for route in app.routes]
    return sorted(f"{method} {path.replace(':path', '')}" for path, methods in found for method in methods)
