"""The laws, on compositions that hypothesis draws: any methods, any gates, up to four deep, any rows.

The quick run draws the same cases each time. The full run draws new ones: `make test-all` shows its seed, and a failure
says how to draw its case again.
"""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from coadapt import PeftModel, Seq, Sum
from coadapt.core.base import base_of
from coadapt.core.composition import names
from coadapt.core.frame import current
from laws.drawing import Batch, batches, compositions, configurations, every, mixed, of_row, refusals, shuffled
from laws.setting import MAKE, close, gradients, logits, recompute, same_gradients, stir
from steps import no_checkpointing, traces

QUICK = ("llama", "gpt2", "t5", "bert")
WITHIN = 1e-5
"""Norms compute in single precision even where all else is double."""

Law = Callable[[str, st.DataObject], None]


def law(quick: int, full: int, models: tuple[str, ...] = tuple(MAKE)) -> Callable[[Law], Any]:
    """A test that draws so many cases for each model: in the quick run, and in the full run."""
    common = {"deadline": None, "database": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
    runs = {
        "quick": settings(max_examples=quick, derandomize=True, **common),
        "full": settings(max_examples=full, derandomize=False, **common),
    }
    which = [pytest.param("quick", m, marks=() if m in QUICK else pytest.mark.full) for m in models]
    which += [pytest.param("full", m, marks=pytest.mark.full) for m in models]

    def made(body: Law) -> Any:
        @pytest.mark.parametrize(("run", "model"), which)
        def test(run: str, model: str) -> None:
            def drawn(data: st.DataObject) -> None:
                body(model, data)

            drawn.__name__ = f"{body.__name__}_{model}"  # the quick run's cases go by it
            runs[run](given(data=st.data())(drawn))()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return made


@functools.cache
def view_of(model: str) -> PeftModel:
    """Every method at once on one model, in double precision: what is active is drawn."""
    view = PeftModel(MAKE[model]())
    for i, (name, config) in enumerate(every(model).items()):
        torch.manual_seed(i)
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=i, by=0.2)
    return view.double()


def together(view: PeftModel, batch: Batch, rows: list[Any]) -> list[Tensor]:
    """What each row of a batch gives, each with its composition."""
    tokens, more = batch.inputs()
    out = logits(view, tokens, adapter_names=rows, **more)
    return [batch.real(out, b) for b in range(len(rows))]


def alone(view: PeftModel, batch: Batch, node: Any, b: int) -> Tensor:
    """What row b gives alone."""
    tokens, more = batch.row(b)
    return logits(view, tokens, adapters=[] if node is None else of_row(node, b), **more)[0]


def score(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.shape[-1])).pow(2).sum()


def refused(view: PeftModel, rows: list[Any], call: Callable[[], Any]) -> bool:
    """Whether `rows` cannot be: then `call` says so, by the documented message, and leaves nothing behind."""
    messages = refusals(view, rows)
    if messages:
        with pytest.raises(ValueError, match="|".join(messages)):
            call()
        assert current() is None
    return bool(messages)


@law(quick=60, full=200)
def test_a_row_of_a_batch_equals_it_alone(model: str, data: st.DataObject) -> None:
    view = view_of(model)
    batch, rows = data.draw(mixed(model, every(model)))
    with torch.no_grad():
        if refused(view, rows, lambda: together(view, batch, rows)):
            return
        for b, out in enumerate(together(view, batch, rows)):
            close(out, alone(view, batch, rows[b], b), WITHIN)
