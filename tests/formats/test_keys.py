"""Keys come from the model's structure: names of adapters and of modules do not matter to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coadapt import BottleneckConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from coadapt.config import PeftConfig
from coadapt.formats.keys import plain_path
from models import gpt2, llama, logits, plain, stir

NAMES = (
    "self_attn",
    "weight",
    "lora",
    "mlp",
    "q",
    "v1.2",
    "foo",
    "foobar",
    "lora_A",
    "prompt_embeddings",
    "model",
    "sites",
)


def config(number: int) -> PeftConfig:
    """Adapters of different methods, so that none can be taken for another."""
    return [
        LoraConfig(r=2 + number % 3, target_modules="all-linear"),
        PromptTuningConfig(num_virtual_tokens=1 + number),
        BottleneckConfig(bottleneck_size=2 + number),
        PrefixTuningConfig(num_virtual_tokens=1 + number),
    ][number % 4]


def keys(folder: Path) -> dict[str, torch.Size]:
    return {k: t.shape for k, t in load_file(folder / "adapter_model.safetensors").items()}


def test_any_adapter_name_round_trips_and_stands_in_no_key(tmp_path: Path) -> None:
    view = PeftModel(llama())
    for number, name in enumerate(NAMES):
        view.add_adapter(name, config(number))
    stir(view.adapters)
    view.set_adapter("foo")
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    for number, name in enumerate(NAMES):
        with torch.no_grad():
            assert torch.equal(logits(view.eval(), adapters=[name]), logits(again, adapters=[name])), name
        get_peft_model(llama(), config(number)).save_pretrained(tmp_path / "alone")
        assert keys(tmp_path / name) == keys(tmp_path / "alone"), name
    assert again.active_adapters == ["foo"]


class Named(nn.Module):
    """Modules called as parameters, files and wrappers are."""

    def __init__(self) -> None:
        super().__init__()
        names = ("weight", "bias", "lora_head", "lora_A", "base_layer", "module", "default", "modules_to_save")
        self.inner = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner.values():
            x = x + torch.tanh(layer(x))
        return x


def named() -> Named:
    torch.manual_seed(0)
    return Named().eval()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules="all-linear", bias="all"),
        LoraConfig(r=2, target_modules=["weight", "lora_A"], modules_to_save=["bias", "lora_head", "base_layer"]),
        BottleneckConfig(bottleneck_size=2, target_modules=["weight", "bias", "modules_to_save"]),
    ],
)
def test_any_module_name_round_trips(config: Any, tmp_path: Path) -> None:
    view = get_peft_model(named(), config)
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(named(), tmp_path)
    x = torch.randn(2, 8)
    with torch.no_grad():
        assert not torch.allclose(view(x), named()(x))
        assert torch.allclose(view(x), again(x), atol=1e-6)
    assert all(k.startswith("base_model.model.inner.") for k in keys(tmp_path))


def test_wrapping_a_module_leaves_no_trace_in_keys(tmp_path: Path) -> None:
    base: Any = plain()
    get_peft_model(plain(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "bare")
    base.first = torch.compile(base.first, backend="eager")
    wrapped: Any = nn.ModuleDict({"_orig_mod": base, "module": plain()})
    assert plain_path(base, "first._orig_mod") == "first"
    assert plain_path(wrapped, "_orig_mod.first._orig_mod") == "_orig_mod.first"
    assert plain_path(wrapped, "module.first") == "module.first"
    view = get_peft_model(base, LoraConfig(target_modules=["first._orig_mod"]))
    view.save_pretrained(tmp_path / "wrapped")
    assert keys(tmp_path / "wrapped") == keys(tmp_path / "bare")


def test_a_compiled_view_saves_like_the_view(tmp_path: Path) -> None:
    view = get_peft_model(gpt2(), LoraConfig(r=2))
    view.save_pretrained(tmp_path / "plain")
    compiled: Any = torch.compile(view, backend="eager")
    compiled.save_pretrained(tmp_path / "compiled")
    assert keys(tmp_path / "plain") == keys(tmp_path / "compiled")


def test_two_tensors_of_one_key_are_refused(tmp_path: Path) -> None:
    class Inner(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.down = nn.Linear(8, 8)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(self.down(input))

    base = nn.ModuleDict({"a": Inner()})
    config = BottleneckConfig(bottleneck_size=8, target_modules=["a"], modules_to_save=["down"])
    view = get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"base_model\.model\.a\.down\.weight"):
        view.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
