"""A base in parts on several processes (FSDP2): the run of one process, to rounding; and the same files."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coadapt.formats.files import GATES
from coadapt.training import devices
from coadapt.training.settings import RunConfig
from devices.ranks import WITHIN, Together, Told, apart, curve, drawn, equal, settings, weights


def test_a_base_in_parts_then_whole_then_in_parts(
    base: str, rows: str, tmp_path: Path, unbroken: tuple[Path, list[Told]]
) -> None:
    """Two processes with a base in parts, one with all of it, two again; under gradient checkpointing."""
    out, parts = tmp_path / "out", list[list[Told]]()
    steps = [(2, 3, ["--fsdp"]), (1, 6, ["--resume"]), (2, None, ["--resume", "--fsdp"])]
    for number, (world, stop, more) in enumerate(steps):
        told = settings(base, rows, out, 4, 1, "--gradient-checkpointing", *more)
        parts.append(Together(tmp_path / f"ranks{number}", world, told, trouble={"stop": stop}).ended())
        assert {one.code for one in parts[-1]} == {0 if stop is None else 1}, parts[-1][0].said
        assert [one.said for one in parts[-1][1:]] == [""] * (world - 1)
        assert "warning" not in parts[-1][0].said
    for told in (parts[0], parts[2]):
        shares = [one.held for one in told]
        assert sum(here for here, _ in shares) == shares[0][1]  # all of it, once
        assert max(here for here, _ in shares) < 0.6 * shares[0][1]
    equal(parts[2])
    expected, alone = unbroken
    assert drawn(*parts) == drawn(alone)
    assert apart(weights(out), weights(expected)) < WITHIN
    torch.testing.assert_close(torch.tensor(curve(out)), torch.tensor(curve(expected)), rtol=WITHIN, atol=WITHIN)
    files = [{p.relative_to(o) for p in o.rglob("*") if "checkpoint" not in str(p)} for o in (out, expected)]
    assert files[0] == files[1]


@pytest.mark.full
def test_learned_gates_beside_a_base_in_parts(base: str, rows: str, tmp_path: Path) -> None:
    """To the bit what they are beside a whole one."""
    found = []
    for number, more in enumerate(([], ["--fsdp"])):
        out = tmp_path / f"out{number}"
        told = settings(base, rows, out, 4, 1, "--composition=prompt + learned*lora", *more)
        ranks = Together(tmp_path / f"ranks{number}", 2, told).ended()
        assert [one.code for one in ranks] == [0, 0], ranks[0].said
        equal(ranks)
        found.append(weights(out) | load_file(out / GATES))
    assert any("gate" in name for name in found[0])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


LAUNCHED = {
    "FSDP_VERSION": ({"FSDP_VERSION": "1"}, "FSDP_VERSION=1: coadapt train shares out the base by FSDP2 only"),
    "offload": ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params.*leave it out"),
    "checkpointing": ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
}


def run(**settings: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": "d", "method": "lora", **settings})


@pytest.mark.parametrize("case", LAUNCHED)
def test_what_accelerate_launch_was_told_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    told, message = LAUNCHED[case]
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", **told}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        devices.settle(run())


def test_accelerate_launch_asks_for_a_base_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not devices.settle(run()).fsdp
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    assert devices.settle(run()).fsdp
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"


@pytest.mark.parametrize(
    ("world", "given", "message"),
    [
        ("1", {}, "and here is one. Start more"),
        ("2", {"load_in_4bit": True}, "fsdp with load_in_4bit: a quantised base in parts was never tried"),
        ("2", {"method": "lora + frod"}, r"fsdp with frod \(frod\).*take another method"),
        ("2", {"method": "shadow"}, r"fsdp with default \(shadow\)"),
        ("2", {"auto_find_batch_size": True}, "works in one process"),
    ],
)
def test_what_goes_not_with_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, world: str, given: dict[str, object], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=message):
        devices.settle(run(fsdp=True, **given))


@pytest.mark.parametrize(
    ("variable", "way"),
    [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context")],
)
def test_other_ways_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str, way: str) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{variable}=true asks for .*{way}.*never tried"):
        devices.settle(run())
