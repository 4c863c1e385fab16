"""Starts that look at data, against the field's, and against what their papers say of the result."""

import dataclasses
import importlib
import sys
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as FieldCordaConfig

import coadapt
from coadapt import (
    CordaConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from formats.field import far, field_loaded, field_logits, field_quietly
from models import MODELS, ids, logits, stir

TARGETS = ["q_proj", "v_proj", "down_proj"]
OPTIONS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS}
EVERY_TOKEN = {"dataloader": [{"input_ids": ids(4, 9, seed=s)} for s in range(3)]}


def factors_of(view: PeftModel) -> dict[str, tuple[Any, Any, float]]:
    return {p.place.path: (p.method.A, p.method.B, p.method.scale) for p in view.get_adapter("default").parts}  # type: ignore[misc]


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_the_fields(method: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # which it imports `dataclass` from, and does not require
    field_corda = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
    ours, field = MODELS["llama"](), MODELS["llama"]()
    before = logits(ours)
    config = LoraConfig(**OPTIONS, init_lora_weights="corda", corda_config=CordaConfig(corda_method=method))
    batches = [ids(1, 9, seed=s) for s in range(5)]
    preprocess_corda(ours, config, lambda: [ours(input_ids=b) for b in batches])
    view = get_peft_model(ours, config).eval()
    assert far(logits(view), before) < 1e-5
    theirs = peft.LoraConfig(**OPTIONS, init_lora_weights="corda", corda_config=FieldCordaConfig(corda_method=method))
    field_quietly(lambda: field_corda(field, theirs, lambda: [field(input_ids=b) for b in batches]))
    model: Any = field_quietly(lambda: peft.get_peft_model(field, theirs))
    for path, (a, b, _) in factors_of(view).items():
        layer = model.base_model.model.get_submodule(path)
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert far(b @ a, expected) < 1e-4 * max(1.0, float(expected.detach().abs().max())), path
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    assert far(field_logits(field_loaded(MODELS["llama"](), tmp_path)), logits(view)) < 1e-5
    again = PeftModel.from_pretrained(MODELS["llama"](), tmp_path, is_trainable=True)
    assert far(logits(again.train()), logits(view)) < 1e-5
    assert again.get_adapter("default").config.to_dict()["corda_config"] == {"corda_method": method}


def test_lora_ga_is_the_fields() -> None:
    ours, field = MODELS["llama"](), MODELS["llama"]()
    before, weights = logits(ours), {k: v.clone() for k, v in ours.state_dict().items()}

    def steps(model: Any) -> None:
        for s in range(2):
            model(input_ids=ids(seed=s), labels=ids(seed=s)).loss.backward()

    for direction, scale in (("ArB2r", "stable"), ("A2rBr", "weight_svd"), ("ArBr", "gd_scale"), ("ArBr", "unit")):
        config = LoraConfig(
            **OPTIONS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale=scale)
        )
        preprocess_loraga(ours, config, lambda: steps(ours))
        view = get_peft_model(ours, config).eval()
        assert far(logits(view), before) < 1e-5
        theirs = peft.LoraConfig(
            **OPTIONS,
            init_lora_weights="lora_ga",
            lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale),  # type: ignore[arg-type]
        )
        field = MODELS["llama"]()
        field_quietly(lambda m=field, c=theirs: peft.tuners.lora.preprocess_loraga(m, c, lambda: steps(m)))
        model: Any = field_quietly(lambda m=field, c=theirs: peft.get_peft_model(m, c))
        for path, (a, b, _) in factors_of(view).items():
            layer = model.base_model.model.get_submodule(path)
            for mine, expected in ((a, layer.lora_A["default"].weight), (b, layer.lora_B["default"].weight)):
                size = float(expected.detach().abs().max())
                assert far(mine.abs(), expected.abs()) < 2e-2 * size, f"{path}, {direction}: signs are free"
        view.unload()
    assert all(torch.equal(v, weights[k]) for k, v in ours.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in ours.parameters())


def test_eva_takes_the_directions_of_most_variance() -> None:
    base = MODELS["llama"]()
    seen: list[Any] = []
    layer = base.model.layers[0].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, 48)))
    for batch in EVERY_TOKEN["dataloader"]:
        base(**batch)
    hook.remove()
    x = torch.cat(seen)
    _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    config = LoraConfig(**OPTIONS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=1.0))
    view = get_peft_model(base, config).eval()
    initialize_lora_eva_weights(view, **EVERY_TOKEN)
    a, b, _ = factors_of(view)["model.layers.0.mlp.down_proj"]
    assert far(a.abs(), vh[:8].abs()) < 1e-3
    assert not b.any()
    assert torch.equal(logits(view), logits(base))
    ranks = {path: len(a) for path, (a, _, _) in factors_of(view).items()}
    assert set(ranks.values()) == {8}
    whitened = get_peft_model(
        MODELS["llama"](),
        LoraConfig(**OPTIONS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=1.0, whiten=True)),
    )
    initialize_lora_eva_weights(whitened, **EVERY_TOKEN)
    a, _, _ = factors_of(whitened)["model.layers.0.mlp.down_proj"]
    assert far(a.abs(), (vh[:8] / s[:8, None].sqrt()).abs()) < 1e-3


def test_eva_shares_ranks_out_as_the_field_does(tmp_path: Any) -> None:
    batches = [{"input_ids": ids(8, 16), "attention_mask": torch.ones(8, 16)}]
    options = {**OPTIONS, "r": 4, "init_lora_weights": "eva", "task_type": "CAUSAL_LM"}
    view = get_peft_model(MODELS["llama"](), LoraConfig(**options, eva_config=EvaConfig(rho=2.0)))
    initialize_lora_eva_weights(view, batches)
    field: Any = field_quietly(
        lambda: peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(**options, eva_config=peft.EvaConfig(rho=2.0)))
    )
    field_quietly(lambda: peft.initialize_lora_eva_weights(field, batches, show_progress_bar=False))
    found = factors_of(view)
    theirs = {
        name.removeprefix("base_model.model."): module
        for name, module in field.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found.keys() == theirs.keys()
    assert {path: len(a) for path, (a, _, _) in found.items()} == {p: m.r["default"] for p, m in theirs.items()}
    assert len({len(a) for a, _, _ in found.values()}) > 1
    assert {s for _, _, s in found.values()} == {4.0}
    for path, (a, _, _) in found.items():
        mine, other = a.detach(), theirs[path].lora_A["default"].weight.detach()
        assert float((mine @ other.mT).diagonal().abs().min()) > 0.9, path
    stir(view.adapters)
    view.save_pretrained(tmp_path)
    assert far(field_logits(field_loaded(MODELS["llama"](), tmp_path)), logits(view.eval())) < 1e-5


def test_padding_and_tokens_without_a_label_do_not_count() -> None:
    def made(batches: list[Any]) -> Any:
        config = LoraConfig(**OPTIONS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
        view = get_peft_model(MODELS["gpt2"](), coadapt.LoraConfig(**{**config.to_dict(), "target_modules": ["c_fc"]}))
        initialize_lora_eva_weights(view, batches)
        return factors_of(view)["transformer.h.0.mlp.c_fc"][0]

    tokens = ids(4, 12)
    labels = tokens.clone()
    labels[:, 8:] = -100
    one, other = made([{"input_ids": tokens, "labels": labels}]), made([{"input_ids": tokens[:, :8]}])
    assert far(one.abs(), other.abs()) < 1e-3


def test_without_its_data_it_does_not_train() -> None:
    view = get_peft_model(MODELS["llama"](), LoraConfig(r=4, init_lora_weights="eva"))
    logits(view.eval())
    with pytest.raises(RuntimeError, match=r"call initialize_lora_eva_weights\(model, dataloader\) before it trains"):
        view.train()(input_ids=ids())
    with pytest.raises(ValueError, match="has no batches"):
        initialize_lora_eva_weights(view, [])
    initialize_lora_eva_weights(view, [{"input_ids": ids()}])
    view.train()(input_ids=ids(), labels=ids()).loss.backward()
    base = MODELS["llama"]()
    config = LoraConfig(r=4, init_lora_weights="corda")
    with pytest.raises(RuntimeError, match="preprocess_corda"):
        get_peft_model(base, config).train()(input_ids=ids())
    preprocess_corda(base, config, lambda: base(input_ids=ids()))
    with pytest.raises(ValueError, match="called with r=4"):
        get_peft_model(base, LoraConfig(r=5, init_lora_weights="corda"))
    with pytest.raises(ValueError, match="was not called"):
        preprocess_corda(base, config, lambda: None)
    with pytest.raises(ValueError, match="not 'lora_ga'"):
        preprocess_loraga(base, config, lambda: None)
    with pytest.raises(ValueError, match="eva_config has no effect"):
        LoraConfig(eva_config={})
    with pytest.raises(ValueError, match="does not start by"):
        initialize_lora_eva_weights(get_peft_model(base, LoraConfig()), [])
