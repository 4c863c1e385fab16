"""AdaMSS of the field's library with scikit-learn's own groups, which adamss/write.py has written down."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coadapt import PeftModel
from models import MODELS

from .field import far, gradients_as_stored, logits, squared

WRITTEN = Path(__file__).parent / "adamss" / "adamss.safetensors"


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_groups_outputs_and_gradients_are_what_was_written(name: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    with safe_open(WRITTEN, "pt") as file:
        (tmp_path / "adapter_config.json").write_text(file.metadata()[name])
        tensors |= {k.removeprefix(f"{name}/"): file.get_tensor(k) for k in file.keys() if k.startswith(f"{name}/")}
    own = {k: t for k, t in tensors.items() if not k.startswith("/")}
    save_file(own, tmp_path / "adapter_model.safetensors")
    base = MODELS[name]()
    before = logits(base)
    view = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    made = logits(view)
    assert far(made, tensors["/logits"]) < 1e-5 < 1e-3 < far(made, before)
    squared(made).backward()
    found = gradients_as_stored(view)
    assert found
    assert {f"/gradient/{key}" for key in found} == {key for key in tensors if key.startswith("/gradient/")}
    for key, gradient in found.items():
        expected = tensors[f"/gradient/{key}"]
        assert far(gradient, expected) < 1e-5 * max(1.0, float(expected.abs().max())), key
    parts = {
        part.place.path: part.method for part in view.get_adapter("default").parts if hasattr(part.method, "subspaces")
    }
    groups = {key.removeprefix("/groups/"): t for key, t in tensors.items() if key.startswith("/groups/")}
    assert parts.keys() == groups.keys()
    for path, method in parts.items():
        assert torch.equal(method.base.get_buffer("group"), groups[path].long()), path
