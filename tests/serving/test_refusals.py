"""Wrong input of every kind: one clear error of the protocol's shape, and the server goes on."""

import socket
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

GOOD: dict[str, Any] = {"model": "task", "prompt": "Once", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "task", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 2}


def error(found: httpx.Response, status: int) -> dict[str, Any]:
    assert found.status_code == status, found.text
    told = found.json()
    assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}
    assert isinstance(told["error"]["message"], str) and told["error"]["message"]
    return told["error"]


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        ({"x_y": {}}, "x_y", "There are: model"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": " end"}, "suffix", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "give 0"),
        ({"frequency_penalty": -1}, "frequency_penalty", "not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 5000}, "max_tokens", "--max-tokens"),
        ({"max_tokens": 256}, "max_tokens", "this model takes 256"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "this server gives 16"),
        ({"prompt": ["a"] * 9, "n": 2}, "prompt", "18 answers"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": [5000]}, "prompt", "no token 5000"),
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": {"text": "a"}}, "prompt", "a text, several texts"),
        ({"prompt": [1, "a"]}, "prompt", "not mixed"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"seed": 2**64}, "seed", ""),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"model": ""}, "model", "at least 1"),
        ({"model": 5}, "model", "string"),
        ({"model": "task +"}, "model", "no composition"),
        ({"model": "learned*task"}, "model", "nothing has trained"),
        ({"model": "token_router(task, other)"}, "model", "nothing has trained"),
        ({"model": "nan*task"}, "model", "nan"),
        ({"model": "1e9*task"}, "model", "between"),
        ({"model": "task + " * 80 + "task"}, "model", "at most 512"),
    ],
)
def test_of_a_completion(http: httpx.Client, change: dict[str, Any], param: str, said: str) -> None:
    told = error(http.post("/v1/completions", json={**GOOD, **change}), 400)
    assert (told["param"], told["type"]) == (param, "invalid_request_error"), told
    assert said in told["message"], told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "'developer'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name is not supported"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "tools are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url is not"),
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, "send one message"),
        ({"model": "task + other", "messages": [{"role": "assistant", "content": "a"}]}, "send one message"),
        ({"top_logprobs": 2}, "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"prompt": "a"}, "There is no field 'prompt'"),
    ],
)
def test_of_a_chat(http: httpx.Client, change: dict[str, Any], said: str) -> None:
    assert said in error(http.post("/v1/chat/completions", json={**CHAT, **change}), 400)["message"]


def test_a_long_prompt_tells_its_length(http: httpx.Client) -> None:
    told = error(http.post("/v1/completions", json={**GOOD, "prompt": "kite " * 300}), 400)
    assert told["code"] == "context_length_exceeded" and "takes 256" in told["message"] and told["param"] == "prompt"
    # Virtual tokens take room, too.
    ids = [5] * 247
    error(http.post("/v1/completions", json={**GOOD, "model": "soft", "prompt": ids}), 400)
    assert http.post("/v1/completions", json={**GOOD, "prompt": ids}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'"a"', b'{"model": NaN}', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000],
)
def test_of_a_body(http: httpx.Client, body: bytes) -> None:
    told = error(http.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)
    assert told["code"] == "invalid_json"


def test_of_paths_methods_and_types(http: httpx.Client) -> None:
    assert "POST /v1/chat/completions" in error(http.post("/v1/chat", json=CHAT), 404)["message"]
    error(http.get("/docs"), 404)
    error(http.get("/openapi.json"), 404)
    error(http.post("/v1/completions/", json=GOOD), 404)
    found = http.get("/v1/completions")
    assert "POST" in error(found, 405)["message"] and found.headers["allow"] == "POST"
    error(http.options("/v1/completions", headers={"origin": "http://elsewhere.example"}), 405)
    # What a page of another site can send without the browser asking first.
    error(http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 415)
    error(http.post("/v1/completions", content=b"{}"), 415)


def test_of_models_that_are_not_there(http: httpx.Client, client: OpenAI) -> None:
    told = error(http.post("/v1/completions", json={**GOOD, "model": "tusk"}), 404)
    assert told["code"] == "model_not_found" and "Did you mean 'task'?" in told["message"]
    error(http.post("/v1/completions", json={**GOOD, "model": "task + tusk"}), 404)
    told = error(http.post("/v1/completions", json={**GOOD, "model": "base + task"}), 400)
    assert told["code"] == "invalid_composition" and "leave it out" in told["message"]
    error(http.post("/v1/completions", json={**GOOD, "model": "../../etc/passwd"}), 404)
    error(http.get("/v1/models/tusk"), 404)
    error(http.get("/v1/models/task%20+%20other"), 404)
    with pytest.raises(openai.NotFoundError, match="no model 'tusk'"):
        client.completions.create(model="tusk", prompt="a")
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="task", prompt="a", best_of=3)


def test_a_host_of_another_name_is_refused(server: Any, http: httpx.Client) -> None:
    """A page whose name leads here (DNS rebinding) must not read what the server says."""
    told = error(http.get("/v1/models", headers={"host": "elsewhere.example"}), 403)
    assert told["code"] == "unknown_host"
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": "http://a.example"}).headers


def test_what_is_no_http_ends_the_connection_only(server: Any, http: httpx.Client) -> None:
    host, _, port = server.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"nonsense\r\n\r\n")
        assert b"400" in line.recv(1000)
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        line.sendall(b"content-length: 100\r\n\r\n{")
    assert http.get("/health").status_code == 200
