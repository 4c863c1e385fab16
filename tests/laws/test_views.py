"""Views of one base do not see each other; nor do threads; and what fails leaves nothing behind."""

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch

from coadapt import PeftModel
from laws.setting import (
    MAKE,
    attach,
    close,
    far,
    fits,
    gradients,
    ids,
    logits,
    loss,
    pairs,
    recompute,
    same_gradients,
    view_on,
)


def beside(case: str, model: str) -> str:
    return next(c for c in ("bottleneck", "lora") if c != case and fits(c, model))


@pairs(4)
def test_two_views_share_a_base_and_nothing_else(case: str, model: str) -> None:
    base = MAKE[model]()
    one, two = attach(base, model, case), attach(base, model, beside(case, model), case, by=0.3)
    alone = logits(view_on(model, case)), logits(view_on(model, beside(case, model), case, by=0.3))
    plain = logits(MAKE[model]())
    for _ in range(2):
        assert torch.equal(logits(one), alone[0])
        assert torch.equal(logits(two), alone[1])
        assert torch.equal(logits(base), plain)
    first, second = loss(one), loss(two)
    (first + second).backward()
    theirs = gradients(two)
    same_gradients(theirs, gradients_of(view_on(model, beside(case, model), case, by=0.3)))
    same_gradients(gradients(one), gradients_of(view_on(model, case)))
    one.unload()
    assert torch.equal(logits(two), alone[1])
    assert torch.equal(logits(base), plain)
    two.unload()
    assert torch.equal(logits(base), plain)


def gradients_of(view: PeftModel) -> dict[str, torch.Tensor | None]:
    loss(view).backward()
    return gradients(view)


def together(*work: Any) -> list[Any]:
    """Runs functions on threads of their own, several times each, at the same time; returns what each gave."""
    results: list[list[Any]] = [[] for _ in work]
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        try:
            start.wait()
            results[i] += [work[i]() for _ in range(6)]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pairs(5)
def test_threads_with_compositions_of_their_own(case: str, model: str) -> None:
    view = view_on(model, case, beside(case, model))
    nodes = ["a", "a + 0.5*b", [], "b"]
    with torch.no_grad():
        expected = [logits(view, adapters=n) for n in nodes]

    def by_using(node: Any) -> torch.Tensor:
        with view.using(node), torch.no_grad():
            return logits(view)

    def by_argument(node: Any) -> torch.Tensor:
        with torch.no_grad():
            return logits(view, adapters=node)

    work = [lambda n=n, f=f: f(n) for n, f in zip(nodes, (by_using, by_argument, by_using, by_argument), strict=True)]
    for got, want in zip(together(*work), expected, strict=True):
        assert all(torch.equal(g, want) for g in got)
    with view.using("b"):
        other: list[Any] = together(lambda: view.active_adapters)
        assert other[0][0] == ["a", "b"], "using is of this thread only"


@pytest.mark.parametrize("reentrant", [True, False])
def test_backwards_on_other_threads(reentrant: bool) -> None:
    """A backward with recomputation that runs on another thread than its forward, while that one goes on."""
    view = view_on("llama", "lora", "prompt").train()
    recompute(view, reentrant)
    expected = {}
    for node in ("a", "b"):
        loss(view, adapters=node).backward()
        expected[node] = gradients(view)
    first = loss(view, adapters="a")
    together_once(first.backward, lambda: logits(view, adapters="b"))
    same_gradients(gradients(view), expected["a"])


def together_once(*work: Any) -> None:
    threads = [threading.Thread(target=w) for w in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Stop(Exception):
    pass


@pairs(0)
def test_an_exception_leaves_nothing_behind(case: str, model: str) -> None:
    base = MAKE[model]()
    plain = logits(base)
    view = attach(base, model, case, beside(case, model))
    adapted = logits(view)

    def stop(*_: Any) -> None:
        raise Stop

    layer = [m for m in base.modules() if not list(m.children()) and list(m.parameters())][-2]
    for call in (
        lambda: logits(view, adapters="a"),
        lambda: logits(view, adapter_names=["a", "b", None]),
        lambda: logits(view),
    ):
        with layer.register_forward_hook(stop), pytest.raises(Stop):
            call()
        assert torch.equal(logits(base), plain)
        assert torch.equal(logits(view), adapted)
    with pytest.raises(Stop), view.using("b"):
        raise Stop
    assert view.active_adapters == ["a", "b"]
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        logits(view, adapters="nobody")
    assert torch.equal(logits(view), adapted)
    view.unload()
    assert torch.equal(logits(base), plain)


COPIES: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda view: pickle.loads(pickle.dumps(view)),
    "torch.save": lambda view: _through_torch(view),
}


def _through_torch(view: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(view, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pairs(1)
def test_a_copy_is_equal_and_independent(case: str, model: str, how: str) -> None:
    view = view_on(model, case, beside(case, model))
    view.set_adapter("a + 0.5*b")
    before = logits(view)
    other = COPIES[how](view)
    assert torch.equal(logits(other), before)
    assert repr(other.composition) == repr(view.composition)
    assert other.get_base_model() is not view.get_base_model()
    loss(other).backward()
    ours, theirs = gradients_of(view), gradients(other)
    same_gradients(ours, theirs)
    with torch.no_grad():
        for parameter in other.adapters.parameters():
            parameter.add_(0.1)
    far(logits(other), before)
    assert torch.equal(logits(view), before)
    plain = other.unload()
    assert [type(m) for m in plain.modules()] == [type(m) for m in MAKE[model]().modules()]
    assert torch.equal(logits(view), before)
    close(logits(plain), logits(view.base))


def test_a_copy_of_the_base_alone_is_a_plain_model() -> None:
    base = MAKE["llama"]()
    view = attach(base, "llama", "lora", "prefix", "prompt")
    for make in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = make(base)
        assert [type(m) for m in other.modules()] == [type(m) for m in MAKE["llama"]().modules()]
        assert torch.equal(logits(other), logits(base))
    assert not torch.equal(logits(view, ids()), logits(base))
