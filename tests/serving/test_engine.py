"""What happens to requests: queues, ends, faults, and whose text is whose."""

import inspect
import threading
import time
from typing import Any

import pytest
import torch

from coadapt.serving.engine import Engine, QueueFull, Stopping
from coadapt.serving.request import Piece, Request
from serving.asking import TOKENIZER, Heard, alone, asked, engine, prompt, several


def request(seed: int = 0, **options: Any) -> Request:
    told: dict[str, Any] = {"tokens": prompt(5, seed), "max_tokens": 6, "temperature": 0, "logprobs": 0, **options}
    return Request(**told)


def test_more_tokens_than_the_model_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens=129: the model takes 128 at most"):
        Engine(several("llama"), TOKENIZER, tokens=129)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"tokens": ()}, "no tokens"),
        ({"tokens": (5, 999)}, "go from 0 to 260"),
        ({"tokens": (-1,)}, "go from 0 to 260"),
        ({"max_tokens": 0}, "at least one token"),
        ({"max_tokens": 124}, "together 129; the model takes 128"),
        ({"max_tokens": 60}, "together 65; this server takes 64"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"stop": ("",)}, "stop text is empty"),
        ({"adapters": "lorra"}, "no adapter 'lorra'. Did you mean 'lora'?"),
        ({"adapters": "lora +"}, "no composition"),
        ({"adapters": "learned*lora"}, "which nothing has trained"),
        ({"adapters": "token_router(lora, wide)"}, "which nothing has trained"),
    ],
)
def test_what_cannot_be_asked(wrong: dict[str, Any], why: str) -> None:
    made = Engine(several("llama"), TOKENIZER, tokens=None if wrong.get("max_tokens") == 124 else 64)
    with pytest.raises(ValueError) as error:
        made.submit(request(**wrong), Heard())
    assert why in str(error.value)
    assert made.stats.waiting == 0


def test_virtual_tokens_take_room_from_a_text() -> None:
    with engine(several("llama")) as made:
        (fits, too_long) = asked(made, [request(adapters="long", max_tokens=n) for n in (118, 119)])
    assert fits.last.error is None
    assert "takes 128 (5 of them for the adapters' virtual tokens)" in str(too_long.last.error)


def test_the_queue_is_bounded_and_stopping_finishes_it() -> None:
    made = Engine(several("llama"), TOKENIZER, rows=2, queue=3)
    heard = [Heard() for _ in range(5)]
    for i, one in enumerate(heard):
        made.submit(request(i), one)
    with pytest.raises(QueueFull, match="5 wait"):
        made.submit(request(), Heard())
    made.start()
    made.stop()
    assert all(one.last.finish in ("length", "stop") for one in heard)
    assert made.stats.waiting == made.stats.running == 0
    with pytest.raises(Stopping):
        made.submit(request(), Heard())


def test_stopping_at_once_cancels() -> None:
    made = Engine(several("llama"), TOKENIZER, rows=1)
    heard = [Heard() for _ in range(3)]
    for one in heard:
        made.submit(request(max_tokens=100), one)
    made.start()
    made.stop(finish=False)
    assert [one.last.finish for one in heard] == ["cancelled"] * 3
    assert not any(thread.name in ("engine", "adapters") for thread in threading.enumerate() if thread.is_alive())


def test_stopping_at_once_finds_a_row_that_is_on_its_way_into_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, heard = Engine(several("llama"), TOKENIZER), Heard()
    join, coming, stopped = made.writer.batch.join, threading.Event(), threading.Event()

    def late(*args: Any) -> None:
        coming.set()
        assert stopped.wait(30)
        join(*args)

    monkeypatch.setattr(made.writer.batch, "join", late)
    made.submit(request(max_tokens=100), heard)
    made.start()
    assert coming.wait(30)
    stopping = threading.Thread(target=made.stop, kwargs={"finish": False})
    stopping.start()
    while not made._stopping:
        time.sleep(0.001)
    stopped.set()
    stopping.join(30)
    assert heard.last.finish == "cancelled"


def test_who_goes_away_leaves_the_batch_and_the_others_go_on() -> None:
    view = several("llama")
    with engine(view, rows=2) as made:
        heard = [Heard() for _ in range(4)]
        tickets = [made.submit(request(i, max_tokens=100, adapters="lora"), one) for i, one in enumerate(heard)]
        while made.stats.running < 2 or made.stats.answer_tokens < 8:
            time.sleep(0.002)
        tickets[0].cancel()
        tickets[3].cancel()  # which waits
        assert heard[0].wait().last.finish == heard[3].wait().last.finish == "cancelled"
        assert heard[0].last.tokens < 100
        for i in (1, 2):
            assert heard[i].wait().tokens == alone(view, request(i, max_tokens=100, adapters="lora"))
        tickets[1].cancel()  # which is done
        assert made.stats.finished["cancelled"] == 2


def test_who_cannot_listen_any_more_is_cancelled() -> None:
    with engine(several("llama")) as made:
        seen: list[Piece] = []

        def broken(piece: Piece) -> None:
            seen.append(piece)
            raise OSError("gone")

        made.submit(request(max_tokens=100), broken)
        (other,) = asked(made, [request(1)])
        while made.stats.running:
            time.sleep(0.002)
    assert other.last.error is None
    assert len(seen) < 50
    assert seen[-1].finish == "cancelled"


class Fails:
    """A model that fails where one of these tokens comes in."""

    def __init__(self, base: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, rows: int = 99) -> None:
        self.forward, self.error, self.rows, self.at = base.forward, error, rows, -1
        self.widths: list[int] = []
        self.__signature__ = inspect.signature(base.forward)
        monkeypatch.setattr(base, "forward", self)

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        self.widths.append(len(input_ids))
        if (input_ids == self.at).any() or len(input_ids) > self.rows:
            raise self.error
        return self.forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_a_fault_ends_the_row_that_has_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = several("llama")
    asking = [request(i, adapters=name, max_tokens=20) for i, name in enumerate(["lora", "ia3", None, "long"] * 2)]
    expected = [alone(view, one) for one in asking]
    fails = Fails(view.base, monkeypatch, RuntimeError("a broken kernel"))
    if where == "prompt":
        fails.at = next(t for t in asking[2].tokens if all(t not in o.tokens for o in asking if o is not asking[2]))
    else:
        fails.at = expected[2][7]
    hit = [fails.at in (*one.tokens, *found[:-1]) for one, found in zip(asking, expected, strict=True)]
    assert hit[2]
    assert not all(hit)
    made = Engine(view, TOKENIZER)
    heard = [Heard() for _ in asking]
    for one, found in zip(asking, heard, strict=True):
        made.submit(one, found)
    made.start()
    for one, found, tokens, wrong in zip(asking, heard, expected, hit, strict=True):
        found.wait()
        if wrong:
            assert (found.last.finish, found.last.error) == ("error", "a broken kernel")
            assert found.tokens == tokens[: len(found.tokens)], one
        else:
            assert found.tokens == tokens, one
    fails.at = -1
    assert asked(made, asking[2:3])[0].tokens == expected[2]  # the engine goes on
    made.stop()


def test_where_memory_is_short_fewer_rows_are_called_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    view = several("llama")
    asking = [request(i, adapters="lora", max_tokens=8) for i in range(9)]
    expected = [alone(view, one) for one in asking]
    fails = Fails(view.base, monkeypatch, torch.OutOfMemoryError("no memory"), rows=2)
    with engine(view) as made:
        heard = asked(made, asking)
    assert [one.tokens for one in heard] == expected
    assert max(fails.widths) > 2
    assert sum(width > 2 for width in fails.widths) < 8  # it was learned from


def test_a_row_without_numbers_ends_and_leaves_no_trace() -> None:
    """Also none in the memory that another row has after it."""
    view = several("llama")
    for parameter in view.get_adapter("wide").parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with engine(view, rows=4) as made:
        bad, good = [request(i, adapters="wide") for i in range(4)], [request(i, adapters="lora") for i in range(8)]
        heard = asked(made, [*bad, *good, *bad, *good])
    for one, found in zip([*bad, *good, *bad, *good], heard, strict=True):
        if one.adapters == "wide":
            assert found.last.error == "The model gave no numbers."
        else:
            assert found.tokens == alone(view, one)


def test_nobody_hears_anothers_text() -> None:
    """Clients on threads of their own, each with its adapter, coming and going; some leave early."""
    view = several("llama")
    names = [None, "lora", "long", "prefix", "bottleneck", "long >> lora"]
    expected = {n: alone(view, request(7, adapters=n, max_tokens=25)) for n in names}
    spelt = {n: TOKENIZER.decode(found, skip_special_tokens=True) for n, found in expected.items()}
    wrong: list[Any] = []

    def client(number: int) -> None:
        for turn in range(3):
            name = names[(number + turn) % len(names)]
            heard = Heard()
            ticket = made.submit(request(7, adapters=name, max_tokens=25), heard)
            if (number + turn) % 4 == 0:
                time.sleep(0.004)
                ticket.cancel()
            heard.wait()
            whole = heard.last.finish != "cancelled"
            if heard.tokens != expected[name][: None if whole else len(heard.tokens)]:
                wrong.append((number, name, heard.tokens))
            if not spelt[name].startswith(heard.text):
                wrong.append((number, name, heard.text))

    with engine(view, rows=5) as made:
        threads = [threading.Thread(target=client, args=(i,)) for i in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(made.stats.finished.values()) == 30
    assert not wrong
