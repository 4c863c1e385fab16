"""A run resumed with other processes: the same rows in each step, and the adapters of one that never stopped."""

import json
from pathlib import Path

import pytest
import torch

from coadapt.training import sharing
from coadapt.training.settings import RunConfig
from coadapt.training.sharing import Share
from devices.ranks import WITHIN, Together, Told, apart, curve, drawn, equal, settings, weights


def test_two_then_one_then_two_processes(
    base: str, rows: str, tmp_path: Path, unbroken: tuple[Path, list[Told]]
) -> None:
    """Stopped in the middle of a pass each time."""
    out, parts = tmp_path / "out", list[list[Told]]()
    for number, (world, stop) in enumerate([(2, 3), (1, 6), (2, None)]):
        again = ["--resume"] if number else []
        together = Together(
            tmp_path / f"ranks{number}", world, settings(base, rows, out, 4, 1, *again), trouble={"stop": stop}
        )
        parts.append(together.ended())
        assert {one.code for one in parts[-1]} == {0 if stop is None else 1}, parts[-1][0].said
        assert [one.said for one in parts[-1][1:]] == [""] * (world - 1)
    assert "Going on from checkpoint-3. A step still has 8 rows: 1 process" in parts[1][0].said.replace("\n", " ")
    equal(parts[2])
    expected, alone = unbroken
    assert drawn(*parts) == drawn(alone)
    assert set(drawn(alone).values()) == {2}
    assert apart(weights(out), weights(expected)) < WITHIN
    assert [line[0] for line in curve(out)] == [line[0] for line in curve(expected)]
    torch.testing.assert_close(torch.tensor(curve(out)), torch.tensor(curve(expected)), rtol=WITHIN, atol=WITHIN)


@pytest.mark.full
def test_one_then_two_then_four_processes(
    base: str, rows: str, tmp_path: Path, unbroken: tuple[Path, list[Told]]
) -> None:
    out, parts = tmp_path / "out", list[list[Told]]()
    for number, (world, stop) in enumerate([(1, 2), (2, 5), (4, None)]):
        again = ["--resume"] if number else []
        told = settings(base, rows, out, 4, 2, *again)
        parts.append(Together(tmp_path / f"ranks{number}", world, told, trouble={"stop": stop}).ended())
        assert {one.code for one in parts[-1]} == {0 if stop is None else 1}, parts[-1][0].said
    assert "gradient_accumulation_steps=1, after 2 processes" in parts[2][0].said.replace("\n", " ")
    equal(parts[2])
    expected, alone = unbroken
    assert drawn(*parts) == drawn(alone)
    assert apart(weights(out), weights(expected)) < WITHIN


def run(**settings: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": "d", "method": "lora", **settings})


@pytest.mark.parametrize(
    ("world", "then", "given", "now"),
    [
        (1, (4, 2, 2), {}, (4, 4)),  # half of the processes: twice the batches
        (2, (4, 4, 1), {}, (4, 2)),
        (4, (4, 1, 2), {}, (2, 1)),  # no batch left to save: shorter ones
        (3, (4, 1, 3), {}, (4, 1)),
        (1, (4, 1, 2), {"per_device_train_batch_size": 8}, (8, 1)),
        (1, (4, 1, 2), {"per_device_train_batch_size": 2}, (2, 4)),  # as given anew
        (2, (4, 2, 1), {"gradient_accumulation_steps": 4}, (1, 4)),
    ],
)
def test_a_step_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, world: int, then: tuple[int, int, int], given: dict[str, int], now: tuple[int, int]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    share = Share(batch=then[0], accumulation=then[1], processes=then[2])
    before = {"per_device_train_batch_size": then[0], "gradient_accumulation_steps": then[1]}
    found = sharing.wanted(sharing.taken_up(run(**{**before, **given}), before, share))
    assert (found.batch, found.accumulation) == now
    assert found.rows == share.rows


@pytest.mark.parametrize(("world", "given"), [(3, {}), (1, {"per_device_train_batch_size": 3}), (16, {})])
def test_processes_that_cannot_share_the_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, world: int, given: dict[str, int]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    before = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    with pytest.raises(ValueError, match=r"a step had 8 rows \(2 processes.*as divide them \(1, 2, 4, 8\)"):
        sharing.taken_up(run(**{**before, **given}), before, Share(batch=4, accumulation=1, processes=2))


def test_an_older_checkpoint_says_it_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    for rank in (0, 1):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    before = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    assert sharing.found(tmp_path, before) == Share(batch=4, accumulation=3, processes=2)
