"""What `coadapt show` tells of routers is what they did in training."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

import models
from coadapt import LoraConfig, PeftModel, Sum, TokenRouter, get_peft_model
from coadapt.training.usage import draw_usage, read_usage, usage_tables


@pytest.fixture
def model() -> PeftModel:
    view = get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter_name="a")
    view.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    view.set_adapter(Sum("a", "b", weights=TokenRouter(temperature=0.5)))
    with torch.no_grad():
        for layer, share in ((0, 0.9), (1, 0.3)):
            network: Any = view.gates[0].sites[f"/model/layers/{layer}/self_attn/q_proj"].network
            network.weight.zero_()
            network.bias.copy_(0.5 * torch.tensor([share, 1 - share]).log())
    return view.train()


def test_the_table_and_the_picture(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "before")
    model(models.ids())
    model.save_pretrained(tmp_path / "after")
    [used] = read_usage(tmp_path / "after")
    assert used.layers() == {
        "model.layers.0": pytest.approx({"a": 0.9, "b": 0.1}),
        "model.layers.1": pytest.approx({"a": 0.3, "b": 0.7}),
    }
    assert used.overall() == pytest.approx({"a": 0.6, "b": 0.4})
    text = io.StringIO()
    for table in usage_tables([used]):
        Console(file=text, width=80).print(table)
    said = [line.split() for line in text.getvalue().splitlines()]
    assert "token_router(a, b, temperature=0.5) · mean gate, by layer" in text.getvalue()
    assert ["model.layers.1", "0.300", "0.700"] in said
    assert ["all", "0.600", "0.400"] in said
    draw_usage([used], tmp_path / "used.png")
    assert imread(tmp_path / "used.png").shape[1] > 1000
    before = read_usage(tmp_path / "before")
    assert [u.sites for u in before] == [{}]
    with pytest.raises(ValueError, match="no router of this folder has been in training"):
        draw_usage(before, tmp_path / "none.png")
