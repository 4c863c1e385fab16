"""LayerNorm tuning and full copies: the values themselves, in several adapters with different sets."""

import pytest
import torch

from coadapt import (
    BottleneckConfig,
    FullCopyConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from coadapt.config import PeftConfig
from models import bert, gpt2, llama, logits, stir


def test_norms_are_found_and_trained_as_they_are() -> None:
    view = get_peft_model(llama(), LNTuningConfig())
    assert len(view.get_adapter("default").parts) == 5
    own = llama()
    before = logits(view)
    torch.testing.assert_close(before, logits(own))
    stir(view.adapters)
    with torch.no_grad():
        for part in view.get_adapter("default").parts:
            own.get_submodule(part.place.path).weight.copy_(part.method.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(logits(view), logits(own))
    assert float((logits(view) - before).detach().abs().max()) > 1e-3
    with pytest.raises(
        ValueError, match=r"LNTuning adapts layers of these kinds: norm; 'model.layers.0.self_attn.q_proj'"
    ):
        get_peft_model(llama(), LNTuningConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, modules_to_save=["classifier"]),
        IA3Config(modules_to_save=["classifier"]),
        BottleneckConfig(bottleneck_size=2, modules_to_save=["classifier"]),
        PrefixTuningConfig(num_virtual_tokens=2, modules_to_save=["classifier"]),
        PromptTuningConfig(num_virtual_tokens=2, modules_to_save=["classifier"]),
        LNTuningConfig(modules_to_save=["classifier"]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_modules_to_save_with_every_method(config: PeftConfig, tmp_path: object) -> None:
    view = get_peft_model(bert(), config, adapter_name="a")
    view.add_adapter("b", LoraConfig(r=2, modules_to_save=["pooler", "LayerNorm"]))
    stir(view.adapters)
    view.eval()
    rows = logits(view, adapter_names=["a", "b", ["a", "b"]])
    for i, one in enumerate(["a", "b", ["a", "b"]]):
        torch.testing.assert_close(rows[i], logits(view, adapters=one)[i], rtol=1e-5, atol=1e-5)
    view.set_adapter("a + b")
    view.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(bert(), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(view))


def test_full_copies_train_and_the_base_stays() -> None:
    base = gpt2()
    view = get_peft_model(base, FullCopyConfig(target_modules=["mlp"]), adapter_name="a")
    assert view.get_nb_trainable_parameters()[0] == sum(
        p.numel() for b in base.transformer.h for p in b.mlp.parameters()
    )
    before = logits(base)
    stir(view.adapters)
    assert torch.equal(logits(base), before)
    expected = logits(view)
    view.merge_adapter()
    torch.testing.assert_close(logits(view), expected)
    with pytest.raises(ValueError, match="target_modules must name the modules to copy"):
        get_peft_model(gpt2(), FullCopyConfig())
