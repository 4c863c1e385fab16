"""What one client can take from the others: bounded, and given back when it goes away."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from coadapt.serving.gate import _is_here
from coadapt.serving.limits import Limits
from coadapt.serving.server import bound

KEY = "a key of the tests"
ASKED: dict[str, Any] = {"model": "task", "prompt": "Once", "temperature": 0, "max_tokens": 2}
LONG: dict[str, Any] = {**ASKED, "max_tokens": 200, "temperature": 1.9}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def narrow(start: Callable[..., Any]) -> Iterator[Any]:
    """A server with a key, one row, no queue, little of everything; each step takes a while."""
    limits = Limits(body=5000, max_tokens=240, choices=2, body_seconds=0.3)
    with start(key=KEY, limits=limits, rows=1, queue=0) as one:
        writer = one.serving.engine.writer
        turn, writer.ends = writer.turn, frozenset()
        writer.turn = lambda: (time.sleep(0.1), turn())
        yield one


@pytest.fixture
def http(narrow: Any) -> Iterator[httpx.Client]:
    with narrow.http(headers={"authorization": f"Bearer {KEY}"}) as one:
        yield one


def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("It did not come.")


def test_the_key(narrow: Any, http: httpx.Client) -> None:
    with narrow.http() as other:
        for path in ("/v1/models", "/metrics", "/no such path"):
            for key in (None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"):
                found = other.get(path, headers={} if key is None else {"authorization": key})
                assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
                assert KEY not in found.text
        assert other.get("/health").status_code == 200
    assert http.get("/v1/models").status_code == http.get("/metrics").status_code == 200
    with narrow.client("wrong") as client, pytest.raises(openai.AuthenticationError, match="wants its key"):
        client.models.list()
    with narrow.client(KEY) as client:
        assert client.models.list().data


def test_a_large_body_is_not_read_whole(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 1000
            time.sleep(0.001)

    for content in (b" " * 5001, endless()):
        found = http.post("/v1/completions", content=content, headers=JSON)
        assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")
        assert "5000 bytes" in found.json()["error"]["message"]
    assert http.post("/v1/completions", content=b" " * 5000, headers=JSON).status_code == 400


def test_a_body_that_does_not_come(narrow: Any) -> None:
    host, _, port = narrow.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
        line.sendall(f"{head}content-type: application/json\r\ncontent-length: 100\r\n\r\n{{".encode())
        found = b""
        while part := line.recv(1000):
            found += part
        assert b" 408 " in found and json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"


def test_answers_and_their_length(http: httpx.Client) -> None:
    for change, said in (({"n": 3}, "gives 2 to one"), ({"max_tokens": 241}, "240 (--max-tokens)")):
        found = http.post("/v1/completions", json={**ASKED, **change})
        assert found.status_code == 400 and said in found.json()["error"]["message"]
    # One row and no queue: of two answers the second has no place, and the first is taken back.
    assert http.post("/v1/completions", json={**ASKED, "n": 2}).status_code == 429


def test_a_full_queue_and_clients_that_go_away(narrow: Any, http: httpx.Client) -> None:
    with narrow.client(KEY) as client:
        _go_away(narrow.serving, http, client)


def _go_away(serving: Any, http: httpx.Client, client: openai.OpenAI) -> None:
    engine = serving.engine
    until(lambda: engine.stats.running == 0)
    before = engine.stats.finished["cancelled"]
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
        next(stream.iter_lines())
        found = http.post("/v1/completions", json=ASKED)
        assert (found.status_code, found.json()["error"]["code"]) == (429, "queue_full")
        assert int(found.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**ASKED)
    # It is gone, and its row with it.
    until(lambda: engine.stats.running == 0 and engine.stats.finished["cancelled"] == before + 1)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=LONG, timeout=0.3)  # no stream: the same
    until(lambda: engine.stats.running == 0 and engine.stats.finished["cancelled"] == before + 2)
    until(lambda: serving.state.running == 0)
    assert http.post("/v1/completions", json=ASKED).status_code == 200


def test_an_engine_that_fails_tells_nobody_why(narrow: Any, http: httpx.Client, monkeypatch: Any, caplog: Any) -> None:
    def fail() -> None:
        raise RuntimeError("somebody's secret")

    monkeypatch.setattr(narrow.serving.engine.writer, "turn", fail)
    found = http.post("/v1/completions", json=ASKED)
    assert found.status_code == 500 and found.json()["error"]["code"] == "internal_error"
    assert "secret" not in found.text and "secret" in caplog.text
    streamed = http.post("/v1/completions", json={**ASKED, "stream": True}).text
    assert "[DONE]" not in streamed and "internal_error" in streamed and "secret" not in streamed
    monkeypatch.undo()
    assert http.post("/v1/completions", json=ASKED).status_code == 200


def test_addresses() -> None:
    with bound("127.0.0.1", 0, None) as taken, pytest.raises(ValueError, match=r"in use.*--port 0 takes a free one"):
        bound("127.0.0.1", taken.getsockname()[1], None)
    with pytest.raises(ValueError, match="--api-key"):
        bound("0.0.0.0", 0, None)
    bound("0.0.0.0", 0, KEY).close()
    with pytest.raises(ValueError, match="no such address"):
        bound("no.such.host.example", 0, KEY)


def test_names_of_this_machine() -> None:
    assert all(map(_is_here, ("localhost", "localhost:8000", "127.0.0.1:1", "127.9.9.9", "[::1]:80")))
    assert not any(map(_is_here, ("", "example.org", "10.0.0.1", "localhost.example.org", "[::1", "127.0.0.1.nip.io")))


def test_tokens_of_prompt_and_answer(start: Callable[..., Any]) -> None:
    with start(tokens=20) as one, one.http() as http:
        asked = {"model": "base", "messages": [{"role": "user", "content": "Once"}], "temperature": 0}
        used = http.post("/v1/chat/completions", json=asked).json()["usage"]
        assert used["total_tokens"] <= 20
        found = http.post("/v1/completions", json={**ASKED, "max_tokens": 20})
        assert found.status_code == 400 and "takes 20" in found.json()["error"]["message"]
