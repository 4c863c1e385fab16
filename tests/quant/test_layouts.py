"""The layouts of GPTQ and AWQ, read number by number; what is quantised twice; what scripts call before training."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from coadapt import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from coadapt.core.store import packed_store, quantised
from coadapt.quant import gptq
from laws.setting import gradients, ids, logits, loss
from quant.quantisers import QUANTISERS, make
from quant.test_laws import apart


def test_the_page_has_a_row_for_each_quantiser() -> None:
    """Written by tests/quant/page.py; what does not hold there is to be explained, and all of it does."""
    page = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text("utf-8")
    rows = [line.split("|") for line in page.split("<!-- table")[1].split("<!-- end")[0].splitlines()[3:]]
    assert [row[1].strip() for row in rows] == list(QUANTISERS)
    for row in rows:
        cells = [cell.strip() for cell in row[4:-1]]
        assert all(cell == "yes" or len(set(cell.split(" of "))) == 1 for cell in cells), row


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_a_stream_of_bits(bits: int) -> None:
    """Number i is in the bits i * bits and up, over the edges of words; here bit by bit."""
    numbers = torch.randint(2**bits, (5, 96))
    words = gptq.packed(numbers, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, 96 * bits // 32)
    for row in range(5):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[row]))
        assert [(stream >> (i * bits)) & (2**bits - 1) for i in range(96)] == numbers[row].tolist()
    assert torch.equal(gptq.unpacked(words, bits).long(), numbers)


def layer(bits: int, version: int, order: bool, kind: str) -> tuple[Any, torch.Tensor]:
    """What gptqmodel's layer holds, and the weight that its numbers stand for, made entry by entry."""
    inputs, outputs, size = 64, 32, 32
    numbers = torch.randint(2**bits, (inputs, outputs))
    zeros = torch.randint(1, 2**bits, (inputs // size, outputs))
    scales = torch.rand(inputs // size, outputs).half()
    groups = torch.arange(inputs) // size
    groups = groups[torch.randperm(inputs)] if order else groups
    weight = torch.empty(outputs, inputs)
    for o in range(outputs):
        for i in range(inputs):
            group = int(groups[i])
            weight[o, i] = scales[group, o].float() * float(numbers[i, o] - zeros[group, o])
    held = types.SimpleNamespace(bits=bits, in_features=inputs, out_features=outputs, group_size=size, scales=scales)
    if kind == "awq":

        def columns(table: torch.Tensor) -> torch.Tensor:
            out = torch.zeros(len(table), outputs // 8, dtype=torch.int64)
            for column in range(outputs):
                place = [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8)
                out[:, column // 8] |= table[:, column] << (4 * place)
            return out.to(torch.int32)

        held.qweight, held.qzeros = columns(numbers), columns(zeros)
        return held, weight
    held.qweight = gptq.packed(numbers.T, bits).T
    held.qzeros = gptq.packed(zeros if version == 2 else zeros - 1, bits)
    held.g_idx, held.qzero_format = groups.int(), lambda: version
    return held, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("version", "order"), [(1, False), (2, True)])
def test_gptq_is_read_as_its_files_are_written(bits: int, version: int, order: bool) -> None:
    held, weight = layer(bits, version, order, "gptq")
    assert apart(gptq.GPTQ().read(held).float(), weight) < 1e-3


def test_awq_is_read_as_its_files_are_written() -> None:
    held, weight = layer(4, 1, False, "awq")
    assert apart(gptq.AWQ().read(held).float(), weight) < 1e-3


def test_a_layout_that_is_not_known_can_be_called_and_not_read() -> None:
    store = gptq.Opaque()
    kernel: Any = type("MarlinLinear", (nn.Module,), {"in_features": 8, "out_features": 4})()
    assert store.shape(kernel) == (4, 8)
    with pytest.raises(TypeError, match=r"MarlinLinear holds its weight in a layout of its own.*backend='torch'"):
        store.read(kernel)


STEPS = {"bnb-nf4": 1e-6, "bnb-nf4-double": 2e-3, "bnb-fp4": 1e-6, "bnb-int8": 1e-3, "torchao-int8": 5e-3}
"""By how much weights that lie on the grid move where they are quantised again. torchao's scale of int8 is the largest
value / 127.5, which the numbers -128 to 127 do not reach; bitsandbytes quantises the scales again, or from float16."""


@pytest.mark.parametrize("name", STEPS)
def test_what_is_read_and_written_again_is_nearly_the_same(name: str) -> None:
    base = make(name)
    path, module, store = next(iter(quantised(PeftModel(base).base)))
    before = store.read(module)
    store.write(module, before)
    assert packed_store(module) is store, path
    assert apart(store.read(module), before) < STEPS[name]


def test_a_base_in_half_precision() -> None:
    """Adapters are in float32, outputs in bfloat16; a merge gives layers of bfloat16, and says what rounding costs."""
    base: LlamaForCausalLM = make("bnb-nf4")
    for _, module, store in quantised(PeftModel(base).base):
        store.write(module, store.read(module))
        module.weight.quant_state.dtype = torch.bfloat16
    base.to(torch.bfloat16)
    view = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    assert {p.dtype for p in view.adapters.parameters()} == {torch.float32}
    y = logits(view)
    assert y.dtype == torch.bfloat16
    loss(view).backward()
    assert all(g is not None and g.dtype == torch.float32 for g in gradients(view).values())
    report = view.merge_adapter()
    assert report is not None
    lost = report.lost("dequantised")
    assert lost is not None
    assert 1e-4 < lost < 0.2
    assert base.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert apart(logits(view).float(), y.float()) < 0.05


def test_numbers_are_counted_as_what_they_stand_for() -> None:
    base = make("bnb-nf4")
    wanted = sum(m.in_features * m.out_features for n, m in base.named_modules() if n.endswith("_proj"))
    wanted += sum(p.numel() for n, p in base.named_parameters() if "_proj" not in n)
    view = get_peft_model(base, LoraConfig(r=2))
    trained, total = view.get_nb_trainable_parameters()
    assert total - trained == wanted


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
def test_preparing_as_scripts_do(options: Any) -> None:
    base: Any = make("bnb-nf4")
    base.model.norm.to(torch.bfloat16)
    base.train()
    assert prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=options) is base
    assert base.model.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in base.parameters())
    assert any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    view = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False)).train()
    loss(view).backward()
    found = gradients(view)
    other: Any = make("bnb-nf4")
    plain = get_peft_model(other, LoraConfig(r=2, init_lora_weights=False)).train()
    plain.get_adapter("default").load_state_dict(view.get_adapter("default").state_dict())
    plain.base.model.norm.load_state_dict(base.model.norm.state_dict())
    loss(plain).backward()
    for key, gradient in gradients(plain).items():
        assert gradient is not None
        assert apart(found[key], gradient) < 1e-5, key  # type: ignore[arg-type]


def test_nothing_is_loaded_for_a_plain_base() -> None:
    import sys

    loaded = {name for name in sys.modules if name in ("bitsandbytes", "torchao", "hqq", "gptqmodel")}
    from models import llama

    logits(get_peft_model(llama(), LoraConfig(r=2)), ids())
    assert {name for name in sys.modules if name in ("bitsandbytes", "torchao", "hqq", "gptqmodel")} == loaded
