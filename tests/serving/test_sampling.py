"""Which token a row is given: by its own request and its own numbers, whatever else is in the batch."""

from typing import Any

import pytest
import torch

from coadapt.serving.request import Request
from coadapt.serving.sampling import BROKEN, Numbers, Ways
from serving.asking import Heard, asked, engine, prompt, several


def request(**options: Any) -> Request:
    return Request(**{"tokens": (5,), "max_tokens": 1, **options})


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"top_k": 3},
    {"top_p": 0.6},
    {"top_k": 4, "top_p": 0.7, "temperature": 2.0},
    {"temperature": 0},
]


def naive(logits: torch.Tensor, asked: Request) -> torch.Tensor:
    """(V,) the chance of each token, by the definition."""
    if asked.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    chances = (logits.double() / asked.temperature).softmax(0)
    order = chances.argsort(descending=True).tolist()
    if asked.top_k:
        order = order[: asked.top_k]
    kept: list[int] = []
    total = sum(float(chances[t]) for t in order)
    while order and sum(float(chances[t]) for t in kept) < asked.top_p * total:
        kept.append(order.pop(0))
    out = torch.zeros_like(chances)
    out[kept] = chances[kept]
    return out / out.sum()


def test_chances_are_those_of_the_definition() -> None:
    """The numbers from 0 to 1 are gone through, so each token is met as often as its chance says."""
    torch.manual_seed(0)
    requests = [request(**options) for options in OPTIONS]
    logits, ways, count = 2 * torch.randn(len(requests), 12), Ways(requests, torch.device("cpu")), 4000
    met = torch.zeros(len(requests), 12)
    for i in range(count):
        tokens = ways.choose(logits, [(i + 0.5) / count] * len(ways.numbers))
        met[torch.arange(len(requests)), tokens] += 1 / count
    for row, one, found in zip(logits, requests, met, strict=True):
        torch.testing.assert_close(found.double(), naive(row, one), atol=2e-3, rtol=0)
        assert torch.equal(found > 0, naive(row, one) > 0.5 / count)


def test_the_ends_of_the_numbers_and_what_is_none() -> None:
    requests = [request(top_k=2), request(temperature=0), request()]
    logits = torch.tensor([[5.0, 4.0, 1.0, 0.0], [torch.nan] * 4, [0.0, 0.0, 0.0, torch.nan]])
    ways = Ways(requests, torch.device("cpu"))
    assert ways.choose(logits, [0.0, 0.0]).tolist() == [0, BROKEN, BROKEN]
    assert ways.choose(logits, [1 - 2**-24, 0.5]).tolist() == [1, BROKEN, BROKEN]  # not what is left out


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-7, 1e-6, 1e-5])
def test_what_is_nearly_cold_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[50.0, 60.0, 59.9, -70.0]])
    ways = Ways([request(temperature=temperature)], torch.device("cpu"))
    assert ways.choose(logits, [0.999] * len(ways.numbers)).tolist() == [1]


def test_numbers_are_those_of_their_seed() -> None:
    one, other, third = Numbers(3), Numbers(3), Numbers(-4)
    first = [one.next() for _ in range(200)]
    assert first == [other.next() for _ in range(200)]
    assert first != [third.next() for _ in range(200)]
    assert all(0 <= n < 1 for n in first)
    assert len(set(first)) == 200


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8, "temperature": 1.5}, {"top_k": 5}])
def test_a_seed_draws_the_same_in_any_company(options: dict[str, Any]) -> None:
    view = several("gpt2")
    drawn = [
        Request(tokens=prompt(4 + i, i), adapters=name, max_tokens=12, seed=i, logprobs=0, **options)
        for i, name in enumerate([None, "lora", "long", "prefix"])
    ]
    greedy = [Request(tokens=prompt(9, i), adapters="ia3", max_tokens=7, temperature=0) for i in range(3)]
    others = [Request(tokens=prompt(2, i), max_tokens=9, top_k=2) for i in range(3)]  # without a seed
    with engine(view, rows=6) as made:
        each = [asked(made, [one])[0].tokens for one in drawn]
        mixed = asked(made, [*others, *drawn, *greedy])[3:7]
        again = asked(made, [others[0]] * 2)
    assert [heard.tokens for heard in mixed] == each
    assert again[0].text != again[1].text


def test_log_probabilities_are_the_models_own() -> None:
    """Before temperature and cuts; of the adapted model."""
    view = several("llama")
    one = Request(tokens=prompt(6, 1), adapters="lora", max_tokens=5, temperature=0.7, top_k=9, seed=1, logprobs=3)
    none = Request(tokens=prompt(3, 1), max_tokens=5, seed=1)
    with engine(view) as made:
        found, silent = asked(made, [one, none])
    ids = torch.tensor([[*one.tokens, *found.tokens]])
    scores = view(ids, adapters="lora").logits[0, len(one.tokens) - 1 : -1].log_softmax(-1)
    chosen = [c for piece in found.pieces for c in piece.chosen]
    assert len(chosen) == 5
    for likely, told in zip(scores, chosen, strict=True):
        assert told.logprob == pytest.approx(float(likely[told.token]), abs=1e-4)
        best = likely.topk(3)
        assert [token for token, _ in told.top] == best.indices.tolist()
        assert [p for _, p in told.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert isinstance(silent, Heard)
    assert silent.tokens == []
