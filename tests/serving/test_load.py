"""The load test counts what it should, on a load that is none."""

import asyncio
from argparse import Namespace
from typing import Any

from transformers import AutoTokenizer

from benchmarks.serving_load import Heard, Run, alone, load
from coadapt.demo import BASE

GREEDY = {"temperature": 0}


def test_requests_are_counted_and_compared(server: Any) -> None:
    tokenizer, given = AutoTokenizer.from_pretrained(BASE), Namespace(requests=2, tokens=4)
    run = asyncio.run(load(server.address, ["task", "base", "other"], given, 3, GREEDY))
    known = asyncio.run(alone(server.address, run, given, GREEDY))
    assert [one.model for one in run.heard] == ["task", "task", "base", "base", "other", "other"]
    assert all(one.ended and 0 < one.first <= one.whole <= run.seconds for one in run.heard)
    requests, lost, same, *_ = run.cells(tokenizer, known)
    assert (requests, lost, same) == ("6", "0", "6")


def test_what_is_not_answered_is_lost(server: Any) -> None:
    given = Namespace(requests=1, tokens=4)
    run = asyncio.run(load(server.address, ["no such model"], given, 2, GREEDY))
    assert [one.ended for one in run.heard] == [False, False]


def test_the_cells_of_a_line() -> None:
    heard = [
        Heard(model="a", prompt="b", text=" the kite", first=0.1 * n, whole=0.2 * n, ended=True) for n in range(1, 102)
    ]
    lost = Heard(model="a", prompt="b", text="", first=0.0, whole=9.0, ended=False)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    count = len(tokenizer(" the kite", add_special_tokens=False)["input_ids"])
    cells = Run(heard=[*heard, lost], seconds=10).cells(tokenizer, {("a", "b"): " the kite"})
    whole = "10200 / 19200 / 20000"
    assert cells == ["102", "1", "101", "5100 / 9600 / 10000", whole, f"{count}", f"{101 * count / 10:.0f}", "10.0"]
