"""What the `openai` package gets from a server: the answers that `generate` gives, one row at a time."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import exp, isclose
from typing import Any

import httpx
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from coadapt.demo import BASE

Expected = Callable[..., str]
PROMPT = "Mia hid the kite.\nQ: Who hid the kite?\nA:"
ASKED: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
MODELS = ["base", "task", "other", "soft", "task + 0.5*other", "soft + task", "0.5*task - other"]


@pytest.mark.parametrize("model", MODELS)
def test_a_completion_is_what_generate_says(client: OpenAI, expected: Expected, model: str) -> None:
    found = client.completions.create(model=model, **ASKED)
    assert found.choices[0].text == expected(None if model == "base" else model)
    assert (found.model, found.object) == (model, "text_completion")
    usage = found.usage
    assert usage is not None
    prompt = len(AutoTokenizer.from_pretrained(BASE)(PROMPT)["input_ids"])
    assert (usage.prompt_tokens, usage.total_tokens) == (prompt, prompt + usage.completion_tokens)


def test_the_models_differ(expected: Expected) -> None:
    assert len({expected(None if model == "base" else model) for model in MODELS[:3]}) == 3


def test_requests_for_all_models_at_once_do_not_see_each_other(client: OpenAI, expected: Expected) -> None:
    def ask(number: int) -> tuple[str, str, str]:
        model = MODELS[number % len(MODELS)]
        text = f"{['Mia', 'Tom', 'Ana'][number % 3]} hid the kite.\nQ: Who hid the kite?\nA:"
        said = client.completions.create(model=model, **{**ASKED, "prompt": text}).choices[0].text
        return said, model, text

    with ThreadPoolExecutor(12) as pool:
        for said, model, text in pool.map(ask, range(21)):
            assert said == expected(None if model == "base" else model, text), (model, text)


def test_chat_puts_the_question_as_in_training(client: OpenAI, expected: Expected) -> None:
    found = client.chat.completions.create(
        model="task", messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=12, temperature=0
    )
    assert found.object == "chat.completion"
    assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", expected("task"))
    parts = client.chat.completions.create(
        model="task",
        messages=[
            {"role": "user", "content": [{"type": "text", "text": PROMPT[:9]}, {"type": "text", "text": PROMPT[9:]}]}
        ],
        max_tokens=12,
        temperature=0,
    )
    assert parts.choices[0].message.content == expected("task")


def test_a_stream_says_the_same_in_pieces(client: OpenAI, expected: Expected) -> None:
    chunks = list(
        client.chat.completions.create(
            model="task",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *said, last = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk.choices[0].delta.role for chunk in said] == ["assistant", *[None] * (len(said) - 1)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == expected("task")
    assert len(said) > 3
    reasons = [chunk.choices[0].finish_reason for chunk in said]
    assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) == {None}
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens >= len(said) - 1
    assert {chunk.usage for chunk in said} == {None}


def test_a_stream_ends_with_done(http: httpx.Client) -> None:
    found = http.post("/v1/completions", json={"model": "task", **ASKED, "stream": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    events = found.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    values = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {value["object"] for value in values} == {"text_completion"}
    assert all("usage" not in value for value in values)


def test_prompts_as_text_list_and_tokens(client: OpenAI, expected: Expected) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    other = PROMPT.replace("Mia", "Tom")
    texts = client.completions.create(model="task", **{**ASKED, "prompt": [PROMPT, other]}, n=2)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    wanted = [expected("task"), expected("task"), expected("task", other), expected("task", other)]
    assert [choice.text for choice in texts.choices] == wanted
    ids = tokenizer(PROMPT)["input_ids"]
    for prompt in (ids, [ids]):
        assert client.completions.create(model="task", **{**ASKED, "prompt": prompt}).choices[0].text == wanted[0]


def test_stop_texts_are_no_part_of_the_answer(client: OpenAI, expected: Expected) -> None:
    whole = expected("task")
    stop = whole[5:7]
    found = client.completions.create(model="task", **ASKED, stop=[stop, "never said"])
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert client.completions.create(model="task", **{**ASKED, "max_tokens": 3}).choices[0].finish_reason == "length"


def test_a_seed_draws_the_same(client: OpenAI) -> None:
    def drawn(**more: Any) -> list[str]:
        made = client.completions.create(model="base", prompt="Once upon a time", max_tokens=16, n=3, **more)
        return [choice.text for choice in made.choices]

    first = drawn(seed=5, temperature=1.5)
    assert first == drawn(seed=5, temperature=1.5) != drawn(seed=6, temperature=1.5)
    assert len(set(first)) > 1  # each choice draws by itself
    greedy = drawn(temperature=0)
    assert drawn(temperature=1.5, extra_body={"top_k": 1}) == greedy == drawn(temperature=1.5, top_p=1e-6)


def test_logprobs(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model="task",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    ).choices[0]
    assert chat.logprobs is not None and chat.logprobs.content is not None
    told = chat.logprobs.content
    assert "".join(one.token for one in told).startswith(chat.message.content or "?")
    for one in told:
        assert len(one.top_logprobs) == 3
        assert isclose(one.top_logprobs[0].logprob, one.logprob, abs_tol=1e-5)  # it is the likeliest
        assert 0 < sum(exp(other.logprob) for other in one.top_logprobs) <= 1 + 1e-5
        assert bytes(one.bytes or []).decode() == one.token
    old = client.completions.create(model="task", **{**ASKED, "max_tokens": 5}, logprobs=2).choices[0].logprobs
    assert old is not None and old.tokens is not None and old.text_offset is not None
    assert old.tokens == [one.token for one in told]
    assert old.text_offset == [len("".join(old.tokens[:number])) for number in range(len(old.tokens))]
    assert [len(top) for top in old.top_logprobs or []] == [2] * len(old.tokens)


def test_models_tell_base_and_root(client: OpenAI) -> None:
    found = {model.id: model.to_dict() for model in client.models.list()}
    assert found["base"]["parent"] is None and found["base"]["root"] == str(BASE)
    assert found["task"]["parent"] == "base" and str(found["task"]["root"]).endswith("/task")
    assert client.models.retrieve("task").to_dict() == found["task"]


def test_what_asks_for_nothing_passes(http: httpx.Client, expected: Expected) -> None:
    nothing = {
        "best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0,
        "user": "somebody", "n": None, "logprobs": None, "stop": None, "stream_options": None, "top_k": -1,
    }  # fmt: skip
    found = http.post("/v1/completions", json={"model": "task", **ASKED, **nothing})
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["text"] == expected("task")


def test_health_and_metrics(http: httpx.Client, client: OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = read()
    used = client.completions.create(model="task", **ASKED).usage
    assert http.get("/no such path").status_code == 404
    after = read()
    assert used is not None

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("coadapt_prompt_tokens_total") == used.prompt_tokens
    assert more("coadapt_answer_tokens_total") == used.completion_tokens
    assert more('coadapt_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert more('coadapt_requests_total{endpoint="other",status="404"}') == 1
    assert more("coadapt_time_to_first_token_seconds_count") == 1
    assert more("coadapt_time_per_token_seconds_count") == 1
    assert after["coadapt_rows_waiting"] == 0
    until = time.monotonic() + 10  # a row that has told its last is taken out after that
    while read()["coadapt_rows_running"]:
        assert time.monotonic() < until
    assert after["coadapt_adapters_loaded"] >= 1
    assert http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_k": 2**31 - 1},
        {"temperature": 5e-324},
        {"temperature": 1e-30, "top_p": 5e-324},
        {"seed": 2**63 - 1, "n": 2},
        {"seed": -(2**63)},
        {"model": "1000*task - 1000*other", "temperature": 0},
        {"prompt": "\0 \ufffd \U0001f600 \u202e <|end|> <|pad|>"},
        {"prompt": " "},
    ],
)
def test_extremes_are_answered(http: httpx.Client, expected: Expected, extreme: dict[str, Any]) -> None:
    asked = {"model": "task", "prompt": "Once", "max_tokens": 4, **extreme}
    found = http.post("/v1/completions", json=asked)
    assert found.status_code == 200, found.text
    after = http.post("/v1/completions", json={"model": "task", **ASKED}).json()
    assert after["choices"][0]["text"] == expected("task")
