"""AdaLoRA's own: files of the field with ranks taken away, convolutions, and what is refused. See laws/test_driving."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from coadapt import AdaLoraConfig, PeftModel, get_peft_model
from formats.field import far, field_quietly
from models import ids, llama, stir

OPTIONS: dict[str, Any] = {"init_r": 4, "target_r": 2, "task_type": "CAUSAL_LM"}


def test_the_fields_folder_with_fewer_ranks(tmp_path: Path) -> None:
    """Trained there until ranks have fallen: its files then hold what is left, and say which ranks those were."""
    model = field_quietly(lambda: peft.get_peft_model(llama(), peft.AdaLoraConfig(total_step=4, **OPTIONS)))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(1, 6):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    field_quietly(lambda: model.save_pretrained(tmp_path / "field"))
    expected = model.eval()(input_ids=ids()).logits
    view = PeftModel.from_pretrained(llama(), tmp_path / "field")
    ranks = {len(part.method.E) for part in view.get_adapter("default").parts}  # type: ignore[arg-type]
    assert min(ranks) < 4
    assert far(view(input_ids=ids()).logits, expected) < 1e-5
    view.save_pretrained(tmp_path / "again")
    again = field_quietly(lambda: peft.PeftModel.from_pretrained(llama(), tmp_path / "again")).eval()
    assert far(again(input_ids=ids()).logits, expected) < 1e-5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_a_convolution_as_in_the_field(tmp_path: Path) -> None:
    view = get_peft_model(Net(), AdaLoraConfig(total_step=4, init_r=3, target_r=2, target_modules=["conv"])).eval()
    stir(view.adapters, by=0.5)
    x = torch.randn(2, 3, 6, 6)
    assert far(view(x), view.base(x)) > 1e-2
    view.save_pretrained(tmp_path)
    assert far(field_quietly(lambda: peft.PeftModel.from_pretrained(Net(), tmp_path)).eval()(x), view(x)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "total_step"),
        ({"total_step": 10, "tinit": 6, "tfinal": 4}, r"tinit \+ tfinal must be less than total_step=10"),
        ({"total_step": 10, "target_r": 13}, "target_r=13 is above init_r=12"),
        ({"total_step": 10, "orth_reg_weight": -1.0}, "orth_reg_weight=-1.0"),
        ({"total_step": 10, "deltaT": 0}, "deltaT=0"),
        ({"total_step": 10, "rank_pattern": {"q_proj.lora_E": [True]}}, "rank_pattern must name each target's E once"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(llama(), AdaLoraConfig(**options))
