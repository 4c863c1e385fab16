"""M3: Prefix Tuning, also for encoder-decoder models."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from coadapt import PeftModel, PrefixTuningConfig, Seq, TaskType, get_peft_model
from coadapt.demo import BASE
from coadapt.training.run import train as run_training
from coadapt.training.settings import RunConfig
from models import gpt2, ids, llama, logits, stir, t5
from steps import error, gradients, loss


@pytest.fixture(scope="module")
def flan_t5_base() -> T5ForConditionalGeneration:
    """The attention of Flan-T5 base; a small vocabulary and feed-forward part, so that it is fast."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "d_model": 768,
        "num_layers": 12,
        "num_heads": 12,
        "d_kv": 64,
        "d_ff": 16,
        "vocab_size": 64,
    }
    tokens: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = T5Config(**shape, **tokens, dropout_rate=0.0, feed_forward_proj="gated-gelu")
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def test_m3_1_the_articles_configuration(flan_t5_base: Any) -> None:
    peft_config = PrefixTuningConfig(
        peft_type="PREFIX_TUNING", task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=20, token_dim=768,
        num_transformer_submodules=2, num_attention_heads=12, num_layers=12, encoder_hidden_size=768)  # fmt: skip
    tokens = ids(2, 6)
    plain = flan_t5_base(input_ids=tokens, labels=tokens).loss
    model = get_peft_model(flan_t5_base, peft_config)
    found = model(input_ids=tokens, labels=tokens).loss
    found.backward()
    assert error(found, plain) > 1e-4
    parameters = list(model.get_adapter("default").parameters())
    assert sum(p.numel() for p in parameters) == 20 * 2 * 768 * 12 * 3
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(input_ids=tokens, **options)
    assert torch.equal(cached, model.generate(input_ids=tokens, **options, use_cache=False))
    model.unload()


FACTS = {
    "token_dim": 24,
    "num_transformer_submodules": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "encoder_hidden_size": 32,
}
"""What the small T5 needs."""


@pytest.mark.parametrize("field", FACTS)
@pytest.mark.parametrize("given", [1, 3, 512])
def test_m3_2_and_m3_6_a_value_that_does_not_fit_is_named(field: str, given: int) -> None:
    base = t5()
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=rf"{field}={given}\b.*\b{FACTS[field]}\b"):
        get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4, **{field: given}))  # type: ignore[arg-type]
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert torch.equal(logits(base), logits(t5()))


def test_m3_2_left_out_it_is_found(tmp_path: Any) -> None:
    from json import loads

    given = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=4, init_seed=1, **FACTS))  # type: ignore[arg-type]
    found = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=4, init_seed=1))
    assert torch.equal(logits(given), logits(found))
    found.save_pretrained(tmp_path)
    stored = loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert {name: stored[name] for name in FACTS} == FACTS


@pytest.mark.parametrize("field, given", [("num_transformer_submodules", 2), ("num_layers", 12), ("token_dim", 100)])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_m3_6_models_of_one_stack_too(make: Any, field: str, given: int) -> None:
    with pytest.raises(ValueError, match=f"{field}={given}"):
        get_peft_model(make(), PrefixTuningConfig(num_virtual_tokens=4, **{field: given}))  # type: ignore[arg-type]


@pytest.mark.parametrize("projected", [False, True])
def test_m3_3_every_parameter_gets_a_gradient(projected: bool) -> None:
    model = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=projected))
    loss(model).backward()
    for name, parameter in model.get_adapter("default").named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None]
        assert (rows.abs().sum(1) > 0).all(), f"{name}: a row without a gradient"


def keys_and_values(model: PeftModel, role: str, layer: int) -> tuple[Tensor, Tensor]:
    places = [p for p in model.get_adapter("default").parts if p.place.role == role]
    method: Any = places[layer].method
    return method.prefix()


def test_m3_3_the_cross_attention_by_hand() -> None:
    """The first decoder layer's cross-attention, computed from its own projections and the prefix."""
    model = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=4, prefix_sites=["cross"]))
    stir(model.adapters, by=0.5)
    attention: Any = model.get_base_model().decoder.block[0].layer[1].EncDecAttention  # type: ignore[union-attr]
    seen: dict[str, Tensor] = {}
    attention.q.register_forward_hook(lambda _, args, y: seen.update(q=y))
    attention.k.register_forward_hook(lambda _, args, y: seen.update(k=y))
    attention.v.register_forward_hook(lambda _, args, y: seen.update(v=y))
    attention.o.register_forward_pre_hook(lambda _, args: seen.update(o=args[0]))
    logits(model)
    q, k, v = (seen[n].view(3, -1, 4, 6).transpose(1, 2) for n in "qkv")  # (B, H, T, D)
    keys, values = (t.expand(3, -1, -1, -1) for t in keys_and_values(model, "cross", 0))
    scores = q @ torch.cat([keys, k], dim=2).mT
    expected = (scores.softmax(-1) @ torch.cat([values, v], dim=2)).transpose(1, 2).flatten(2)
    assert error(seen["o"], expected) < 1e-6


@pytest.mark.parametrize("make", [t5, llama, gpt2])
def test_m3_4_stacked(make: Any) -> None:
    """adapter2(adapter1(base)): both take part, both learn, and one in front of the other is their joint prefix."""
    model = get_peft_model(make(), PrefixTuningConfig(num_virtual_tokens=4), adapter_name="adapter1")
    model.add_adapter("adapter2", PrefixTuningConfig(num_virtual_tokens=2))
    stir(model.adapters, by=0.5)
    model.set_adapter(Seq("adapter1", "adapter2"))
    both = logits(model)
    assert error(logits(model, adapters="adapter1 + adapter2"), both) < 1e-6
    for name in ("adapter1", "adapter2"):
        assert error(logits(model, adapters=name), both) > 1e-3
    loss(model).backward()
    assert gradients(model, "adapter1").norm() > 0
    assert gradients(model, "adapter2").norm() > 0


def train(model: PeftModel, count: int = 8) -> list[float]:
    optimizer = torch.optim.Adam(model.param_groups(), lr=0.05)
    values = []
    for _ in range(count):
        found = model(input_ids=ids(), labels=ids(seed=1)).loss
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        values.append(float(found.detach()))
    return values


def test_m3_4_trained_one_after_another() -> None:
    model = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=4), adapter_name="adapter1")
    first = train(model)
    model.freeze("adapter1")
    kept = model.get_adapter("adapter1").weight.clone()
    model.add_adapter("adapter2", PrefixTuningConfig(num_virtual_tokens=4))
    model.set_adapter("adapter1 >> adapter2")
    second = train(model)
    assert first[-1] < first[0]
    assert second[-1] < min(first)
    assert torch.equal(model.get_adapter("adapter1").weight, kept)
    together = get_peft_model(t5(), PrefixTuningConfig(num_virtual_tokens=4), adapter_name="adapter1")
    together.add_adapter("adapter2", PrefixTuningConfig(num_virtual_tokens=4))
    together.set_adapter("adapter1 >> adapter2")
    values = train(together)
    assert values[-1] < values[0]


def test_m3_7_memory_in_the_log_and_a_forecast_before_the_run(tmp_path: Path) -> None:
    """A run of the command line's own, with a prefix on the shipped base."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Mia hid kite {i}."}) + "\n" for i in range(8)), "utf-8")
    asked = {"model": str(BASE), "data": str(rows), "method": "prefix", "num_virtual_tokens": 3, "eval_split": 0.25}
    run = RunConfig(**asked, max_steps=2, logging_steps=1, output_dir=str(tmp_path / "out"), save_strategy="no")
    said = io.StringIO()
    run_training(run, Console(file=said, width=120))
    assert "memory" in said.getvalue()
    assert "without activations" in said.getvalue()
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    peaks = [line["train/peak_memory_gib"] for line in log if "train/loss" in line]
    assert len(peaks) == 2
    assert 0 < peaks[0] <= peaks[1]
