"""At which classes of layers the field's library has a method and computes the same, and that files say so."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coadapt import BdLoraConfig, get_peft_model
from coadapt.config import TargetedConfig
from coadapt.core.adapter import replace_options
from coadapt.formats.configs import READABLE
from models import VOCABULARY, ids, stir

from .field import CASES, Case, field_quietly, grouping

LAYERS: dict[str, Any] = {
    "Linear": lambda: nn.Linear(16, 16),
    "Conv1D": lambda: Conv1D(16, 16),
    "Embedding": lambda: nn.Embedding(VOCABULARY, 16),
    "Conv1d": lambda: nn.Conv1d(16, 16, 3, padding=1),
    "Conv2d": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "Conv3d": lambda: nn.Conv3d(16, 16, 3, padding=1),
}
ELSEWHERE = ("LN_TUNING", "ADAPTION_PROMPT", "POLY", "TRAINABLE_TOKENS", "ALORA", "SHADOW")
"""Not at layers that have these kinds, not without tasks, at the one embedding of a model, by its tokens."""
PLACES = ("task_type", "target_modules", "layers_to_transform", "layers_pattern", "feedforward_modules")


class Around(nn.Module):
    """A layer between an embedding and a head; images and volumes are made of nine tokens."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name, self.embed = name, nn.Embedding(VOCABULARY, 16)
        self.site, self.head = LAYERS[name](), nn.Linear(16, 3)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.name == "Embedding":
            return self.head(torch.tanh(self.site(tokens)))
        h = self.embed(tokens)
        sizes = {"Conv1d": (9,), "Conv2d": (3, 3), "Conv3d": (3, 3, 1)}.get(self.name)
        if sizes is None:
            return self.head(torch.tanh(self.site(h)))
        return self.head(torch.tanh(self.site(h.mT.unflatten(2, sizes))).flatten(2).mT)


def _first() -> dict[str, Case]:
    """Of each method that has sites at layers the first case, without its places."""
    found: dict[str, Case] = {}
    for case in CASES.values():
        config = case.ours()
        if isinstance(config, TargetedConfig) and config.method not in ELSEWHERE:
            own = {k: v for k, v in case.options.items() if k not in PLACES and not k.endswith("_pattern")}
            found.setdefault(config.method, replace(case, options=own))
    return found


FIRST = _first()


QUICK = ("LORA", "ADALORA", "HRA", "OFT")


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in QUICK else pytest.mark.full) for m in FIRST])
def test_what_the_field_takes_is_what_files_say_of_it(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FIRST[method]
    if method == "ADAMSS":
        grouping(monkeypatch)
    theirs: set[str] = set()
    ours: set[str] = set()
    for name in LAYERS:
        config = replace_options(case.ours(), target_modules=["site"])
        if method == "IA3":
            config = replace_options(config, feedforward_modules=[])
        if method == "BD_LORA":
            config = replace_options(config, use_bdlora=BdLoraConfig(target_modules_bd_a=["site"], nblocks=2))
        try:
            view = get_peft_model(Around(name), config).eval()
        except ValueError:  # the method has no place there
            continue
        stir(view.adapters, by=0.3)
        expected = view(ids(2, 9)).detach()
        assert float((expected - Around(name)(ids(2, 9))).abs().max()) > 1e-4
        view.save_pretrained(tmp_path / name)
        said = json.loads((tmp_path / name / "adapter_config.json").read_text())
        ours |= {name} if said.pop(READABLE, True) else set()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(said))
        found = _of_the_field(Around(name), tmp_path / name)
        theirs |= {name} if found is not None and torch.allclose(found, expected, atol=1e-5) else set()
    assert ours == theirs
    assert ours


def _of_the_field(base: nn.Module, folder: Path) -> Tensor | None:
    """What the field's library gives with a folder; None where it does not take it."""
    try:
        return field_quietly(lambda: peft.PeftModel.from_pretrained(base, folder)).eval()(ids(2, 9))
    except Exception:  # whatever it raises
        return None
