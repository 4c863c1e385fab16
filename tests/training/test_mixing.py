"""How rows of several data sets come into one batch, and what each adapter's gradient is then."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import models
from coadapt import LoraConfig, PeftModel
from coadapt.evaluation.losses import row_losses, trained
from coadapt.training.joint import DATASET, kept
from coadapt.training.losses import groups, window
from coadapt.training.mixing import Batches, Stream, shares, temperature_weights
from models import stir

# ---- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "weights", "expected"),
    [
        (8, [1, 1], [4, 4]),
        (8, [5, 3], [5, 3]),
        (8, [24, 14], [5, 3]),
        (8, [1, 1000], [1, 7]),
        (3, [1, 1000, 1000], [1, 1, 1]),
        (10, [1, 1, 1], [4, 3, 3]),
        (7, [0.1, 0.2], [2, 5]),
        (6, [1, 1, 1, 50], [1, 1, 1, 3]),
    ],
)
def test_shares_are_whole_rows_as_near_to_the_weights_as_can_be(
    batch: int, weights: list[float], expected: list[int]
) -> None:
    assert shares(batch, weights) == expected


def test_temperature_goes_from_the_rows_to_equal_shares() -> None:
    assert temperature_weights([100, 10_000], 1) == [100, 10_000]
    one, other = temperature_weights([100, 10_000], 2)
    assert other / one == pytest.approx(10)
    one, other = temperature_weights([100, 10_000], math.inf)
    assert one == other


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_passes_over_its_rows_again_and_again_each_time_in_another_order() -> None:
    stream = Stream(rows=7, batch=2, accumulation=3, seed=5)
    assert (stream.batches, stream.steps) == (4, 2)
    for passed in range(3):
        steps = [stream.drawn(2 * passed + step) for step in (0, 1)]
        assert [[len(batch) for batch in step] for step in steps] == [[2, 2, 2], [1]]
        drawn = [row for step in steps for batch in step for row in batch]
        assert drawn == torch.randperm(7, generator=torch.Generator().manual_seed(5 + passed)).tolist()


def test_a_stream_begins_and_ends_at_its_steps_wherever_they_are() -> None:
    early = Stream(rows=7, batch=2, accumulation=1, seed=5)
    late = Stream(rows=7, batch=2, accumulation=1, seed=5, start=10, stop=13)
    assert [late.drawn(step) for step in (0, 9, 13, 99)] == [[]] * 4
    assert [late.drawn(step) for step in (10, 11, 12)] == [early.drawn(step) for step in (0, 1, 2)]
    assert (early.end(2.5), late.end(2.5)) == (10, 13)


def test_the_batches_of_several_streams_are_those_of_each_side_by_side() -> None:
    streams = [Stream(rows=7, batch=2, accumulation=2, seed=1), Stream(rows=20, batch=3, accumulation=2, seed=1)]
    step = 0
    batches = Batches(streams, lambda: step)
    assert len(batches) == 8  # four steps of the longer one, each of two batches
    for epoch in range(3):
        step = epoch * batches.steps
        found = list(batches)
        assert len(found) == 8
        for number, stream in enumerate(streams):
            for step in range(4):
                own = [[r for d, r in batch if d == number] for batch in found[2 * step : 2 * step + 2]]
                drawn = [list(rows) for rows in stream.drawn(4 * epoch + step)]
                assert [rows for rows in own if rows] == drawn


def test_one_stream_by_itself_has_its_own_epochs() -> None:
    batches = Batches([Stream(rows=7, batch=2, accumulation=3, seed=1)], lambda: 0)
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert len(batches) == 4


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_data_sets_that_train_an_adapter_in_common_are_a_group() -> None:
    assert groups([["a"], ["b"], ["c"]]) == [0, 1, 2]
    assert groups([["a"], ["b"], ["a", "b"], ["c"]]) == [0, 0, 0, 3]
    assert groups([["a"], [], []]) == [0, 1, 2]


def test_losses_of_rows_are_those_of_the_rows_alone() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 2:] = -100
    labels[1, 0] = -100
    for task, shifted in (("causal-lm", 1), ("seq2seq", 0), ("token-classification", 0)):
        ours = row_losses(logits, labels, task)  # type: ignore[arg-type]
        own = labels[:, shifted:]
        for row in range(3):
            where = [t for t in range(5 - shifted) if own[row, t] != -100]
            expected = sum(-torch.log_softmax(logits[row, t], -1)[own[row, t]] for t in where)
            assert float(ours[row]) == pytest.approx(float(expected), rel=1e-5)
            assert int(trained(labels, task)[row]) == len(where)  # type: ignore[arg-type]
    classes = torch.tensor([1, 0, 3])
    assert row_losses(logits[:, 0], classes, "sequence-classification").sum() == pytest.approx(
        F.cross_entropy(logits[:, 0], classes, reduction="sum")
    )
    assert trained(classes, "sequence-classification").tolist() == [1, 1, 1]


COMPOSITIONS = ["a", "a + b", "c", "b >> a", "0.5*d"]


def mixed(view: PeftModel, ids: torch.Tensor, mask: torch.Tensor, rows: list[int], parts: list[list[int]]) -> None:
    """One step in several batches, as the trainer makes it."""
    labels = ids.masked_fill(mask == 0, -100)
    tokens = [float(trained(labels, "causal-lm")[[r == d for r in rows]].sum()) for d in range(len(COMPOSITIONS))]
    view.zero_grad()
    made = window(tokens, [view.checked(c) and [n for n in "abcd" if n in c] for c in COMPOSITIONS])
    for part in parts:
        out = view(input_ids=ids[part], attention_mask=mask[part], adapter_names=[COMPOSITIONS[rows[i]] for i in part])
        losses = row_losses(out.logits, labels[part], "causal-lm")
        made.loss(losses, torch.tensor([rows[i] for i in part]))[0].backward()
    for name, factor in made.factors.items():
        for p in view.get_adapter(name).parameters():
            p.grad.mul_(factor)  # type: ignore[union-attr]


def test_each_adapter_has_the_gradient_of_the_mean_over_its_own_tokens() -> None:
    view = PeftModel(models.llama(), LoraConfig(r=2), "a")
    for name in "bcd":
        view.add_adapter(name, LoraConfig(r=3, target_modules=["v_proj", "down_proj"]))
    stir(view.adapters)
    torch.manual_seed(0)
    rows = [0, 1, 1, 2, 3, 3, 3, 4, 0, 2]
    ids = torch.randint(3, 60, (10, 9))
    mask = (torch.arange(9) < torch.randint(3, 10, (10, 1))).long()
    mixed(view, ids, mask, rows, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]])
    found = {name: [p.grad for p in view.get_adapter(name).parameters()] for name in "abcd"}
    for name in "abcd":
        view.zero_grad()
        mine = [i for i, d in enumerate(rows) if name in COMPOSITIONS[d]]
        total, count = torch.zeros(()), 0
        for i in mine:  # row by row
            length = int(mask[i].sum())
            logits = view(input_ids=ids[i : i + 1, :length], adapters=COMPOSITIONS[rows[i]]).logits[0]
            total = total + F.cross_entropy(logits[:-1], ids[i, 1:length], reduction="sum")
            count += length - 1
        (total / count).backward()
        for ours, p in zip(found[name], view.get_adapter(name).parameters(), strict=True):
            assert ours is not None
            assert p.grad is not None
            assert float((ours - p.grad).norm() / p.grad.norm()) < 1e-5


def test_rows_of_a_data_set_that_has_stopped_leave_no_trace() -> None:
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
        "labels": torch.tensor([[5, 6, 7, 8], [5, 6, -100, -100], [-100, 6, 7, -100]]),
        DATASET: torch.tensor([0, 1, 1]),
    }
    assert kept(batch, [True, True], "causal-lm") is batch
    left = kept(batch, [False, True], "causal-lm")
    assert left[DATASET].tolist() == [1, 1]
    assert left["input_ids"].tolist() == [[5, 6, 0], [5, 6, 7]]
    assert left["labels"].tolist() == [[5, 6, -100], [-100, 6, 7]]
    wide = {**batch, "labels": torch.tensor([[1, -100, -100, -100], [1, 2, 3, 4], [1, -100, -100, -100]])}
    assert kept(wide, [False, True], "seq2seq")["labels"].tolist() == [[1, 2, 3, 4], [1, -100, -100, -100]]
    assert len(kept(batch, [False, False], "causal-lm")["labels"]) == 0
