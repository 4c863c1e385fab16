"""What BitFit does where a layer has no bias, and beside methods that do something to biases themselves."""

from functools import partial
from typing import Any, cast

import pytest
import torch

from coadapt import (
    AdaLoraConfig,
    BitFitConfig,
    FourierFTConfig,
    GloraConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    get_peft_model,
)
from models import bert, gpt2, ids, llama, logits, plain, stir


def test_a_bias_that_is_new_is_told_of_when_it_is_merged_for_good() -> None:
    view = get_peft_model(llama(), BitFitConfig(target_modules=["q_proj"]))
    stir(view.adapters)
    wanted = logits(view, ids())
    with pytest.warns(UserWarning, match="2 layers that had no bias"):
        base = view.merge_and_unload()
    torch.testing.assert_close(logits(base, ids()), wanted)


@pytest.mark.parametrize("bias", ["glora_only", "all"])
def test_glora_scales_the_bias_that_is_trained(bias: str) -> None:
    """b' = (b + delta) + (b + delta) * D + E + W C"""
    base = plain()
    view = get_peft_model(base, GloraConfig(r=2, config_D_E="vector", target_modules=["first"], bias=bias))
    stir(view.adapters)
    at_first = [part.method for part in view.get_adapter("default").parts if part.place.path == "first"]
    beside, glora = cast(Any, at_first)
    trained = base.first.bias + beside.delta
    wanted = trained + trained * glora.part("D") + glora.part("E") + (base.first.weight @ glora.part("C"))[:, 0]
    view.merge_adapter()
    torch.testing.assert_close(base.first.bias, wanted)


@pytest.mark.parametrize(
    ("config", "bias"),
    [
        (LoraConfig, "lora_only"),
        (partial(OFTConfig, oft_block_size=4), "oft_only"),
        (partial(MissConfig, r=4), "MiSS_only"),
        (partial(MissConfig, r=4), "miss_only"),
        (partial(FourierFTConfig, n_frequency=8), "fourier_only"),
        (partial(FourierFTConfig, n_frequency=8), "fourierft_only"),
        (partial(AdaLoraConfig, total_step=9), "lora_only"),
    ],
)
def test_only_the_targets_biases(config: Any, bias: str) -> None:
    view = get_peft_model(plain(), config(target_modules=["first"], bias=bias))
    kinds = [(part.place.path, type(part.method).__name__ == "BitFit") for part in view.get_adapter("default").parts]
    assert kinds == [("first", False), ("first", True)]
    with pytest.raises(ValueError, match="bias='vera_only' is not one of 'none'"):
        config(bias="vera_only")


def test_a_copied_modules_bias_is_the_copys() -> None:
    view = get_peft_model(bert(), OFTConfig(oft_block_size=8, bias="all", task_type="SEQ_CLS"))
    at_head = [type(p.method).__name__ for p in view.get_adapter("default").parts if p.place.path == "classifier"]
    assert at_head == ["ModuleCopy"]


def test_biases_of_two_adapters_and_the_base_without_them() -> None:
    view = get_peft_model(gpt2(), LoraConfig(bias="all"), adapter_name="one")
    view.add_adapter("two", FourierFTConfig(n_frequency=8, target_modules=["c_attn"], bias="fourier_only"))
    stir(view.adapters)
    with view.disable_adapter():
        assert torch.equal(logits(view), logits(gpt2()))
    one, two, both = (logits(view, adapters=a) for a in ("one", "two", "one + two"))
    assert not torch.equal(one, both)
    assert not torch.equal(two, both)
