"""A base that lies on several devices of one process, its disk among them: trained and asked as on one."""

import json
from pathlib import Path

import pytest
import torch

from coadapt.cli.group import run
from coadapt.training import devices
from coadapt.training.load import load
from coadapt.training.settings import RunConfig
from devices.ranks import apart, curve, settings, weights

MAP = {
    "model.embed_tokens": "disk",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.filterwarnings("ignore:.*")
def test_an_offloaded_base_is_trained_as_a_whole_one(base: str, rows: str, tmp_path: Path) -> None:
    whole, spread = tmp_path / "whole", tmp_path / "spread"
    how = ["--method=lora + prefix + bottleneck", "--max-steps=4", "--gradient-checkpointing"]
    assert run(settings(base, rows, whole, 4, 2, *how)) == 0
    spread_out = [f"--device-map={json.dumps(MAP)}", "--max-memory={cpu: 1GiB}"]
    assert run(settings(base, rows, spread, 4, 2, *how, *spread_out)) == 0
    assert apart(weights(spread), weights(whole)) < 1e-4
    torch.testing.assert_close(torch.tensor(curve(spread)), torch.tensor(curve(whole)), rtol=1e-4, atol=1e-4)
    one, other = load(None, whole, device=torch.device("cpu")), load(None, spread, device_map=MAP)
    assert {p.device.type for p in other.model.base.parameters()} == {"cpu", "meta"}
    assert {p.device.type for p in other.model.adapters.parameters()} == {"cpu"}
    ids = torch.arange(5, 17).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(other.model(input_ids=ids).logits, one.model(input_ids=ids).logits)
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(other.model.generate(**asked), one.model.generate(**asked))


def test_all_on_disk_is_refused(base: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run([*settings(base, rows, out, 4, 2), 'device_map={"": disk}']) == 1
    assert "leaves all of the base on disk, as one. Name its parts (those of model, lm_head" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("world", "given", "message"),
    [
        ("2", {}, "devices of one process, and here are 2. Start one"),
        ("1", {"fsdp": True}, "and here are 1 and fsdp"),
        ("1", {"load_in_8bit": True}, "device_map with load_in_8bit was never tried"),
    ],
)
def test_what_goes_not_with_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, world: str, given: dict[str, object], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    told = {"model": "m", "data": "d", "method": "lora", "device_map": "auto", **given}
    with pytest.raises(ValueError, match=message):
        devices.settle(RunConfig.model_validate(told))


def test_memory_without_a_map_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--model=m", "--data=d", "--method=lora", "max_memory={0: 1GiB}"]) == 2
    assert "max_memory has no effect without device_map" in capsys.readouterr().err
    assert run(["generate", "--model=m", "--prompt=p", "--use-cpu", "--device-map=auto"]) == 2
    assert "give one" in capsys.readouterr().err
