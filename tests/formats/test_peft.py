"""Folders go both ways between coadapt and the field's library: equal logits, in fp32, in the same process."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import coadapt
from coadapt import PeftModel, get_peft_model
from coadapt.methods.cpt import CPT
from models import MODELS, ids, stir

from .field import (
    CASES,
    Case,
    far,
    field_gradients,
    field_loaded,
    field_logits,
    field_quietly,
    field_stirred,
    gradients_as_stored,
    grouping,
    logits,
    over_again,
    prefix,
    squared,
    stirred,
)


def _spread() -> list[Any]:
    """One case for each method in the quick run, and all of those that were there first."""
    seen: set[str] = set()
    out: list[Any] = []
    for name, case in CASES.items():
        method = case.ours().method
        thorough = method in ("LORA", "DORA", "IA3", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
        out.append(pytest.param(name, marks=() if thorough or method not in seen else pytest.mark.full))
        seen.add(method)
    return out


@pytest.fixture(params=_spread())
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    if CASES[request.param].config == "AdamssConfig":
        grouping(monkeypatch)
    return CASES[request.param]


# ---- both ways -------------------------------------------------------------------------------------------------------


def test_the_field_loads_what_coadapt_wrote(case: Case, tmp_path: Path) -> None:
    view = stirred(case)
    expected = logits(view)
    assert far(expected, logits(case.base())) > 5e-4
    view.save_pretrained(tmp_path)
    assert far(field_logits(field_loaded(case.base(), tmp_path)), expected) < 1e-5


def test_coadapt_loads_what_the_field_wrote(case: Case, tmp_path: Path) -> None:
    model = field_stirred(case)
    expected = field_logits(model)
    assert far(expected, logits(case.base())) > 5e-4
    field_quietly(lambda: model.save_pretrained(tmp_path))
    view = PeftModel.from_pretrained(case.base(), tmp_path)
    assert far(logits(view), expected) < 1e-5


def test_gradients_are_the_fields(case: Case, tmp_path: Path) -> None:
    if case.wrong_gradients:
        pytest.skip(case.wrong_gradients)
    config = case.ours()
    if config.for_inference() is not config:
        pytest.skip("files do not hold the network that is trained: its gradients are compared below")
    if getattr(config, "save_only_topk_weights", False):
        pytest.skip("such files are not to be trained on")
    model = field_stirred(case)
    field_quietly(lambda: model.save_pretrained(tmp_path))
    view = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True).eval()
    if any(type(part.method) is CPT for part in view.get_adapter("default").parts):
        pytest.skip("what is stored is not the change that is trained: its steps are compared in test_cpt.py")
    for each, made in ((view, logits(view)), (model, field_logits(model))):
        squared(made).backward()
        assert any(p.grad is not None for p in each.parameters())
    ours, theirs = gradients_as_stored(view), field_gradients(model)
    assert ours
    assert ours.keys() == theirs.keys()
    for key, gradient in ours.items():
        assert far(gradient, theirs[key].view(gradient.shape)) < 1e-5 * max(1.0, float(theirs[key].abs().max())), key


@pytest.mark.parametrize("name", ["llama-ptuning", "gpt2-ptuning", "llama-ptuning-lstm", "gpt2-projected"])
def test_networks_that_make_virtual_tokens_get_the_fields_gradients(name: str) -> None:
    """The field's projection makes all layers' keys and values in one matrix, ours in one for each layer."""
    case = CASES[name]
    model, view = field_stirred(case), get_peft_model(case.base(), case.ours()).eval()
    own: dict[str, list[torch.nn.Parameter]] = {}
    for key, parameter in view.named_parameters():
        if parameter.requires_grad:
            own.setdefault(re.sub(r"second\.\d+", "second", key), []).append(parameter)
    theirs = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parts, whole in zip(own.values(), theirs, strict=True):
            for part, piece in zip(parts, whole.split([len(p) for p in parts]), strict=True):
                part.copy_(piece)
    for made in (logits(view), field_logits(model)):
        squared(made).backward()
    assert far(logits(view), field_logits(model)) < 1e-5
    for (key, parts), whole in zip(own.items(), theirs, strict=True):
        gradient = torch.cat([p.grad for p in parts if p.grad is not None])
        assert far(gradient, whole.grad) < 1e-5 * max(1.0, float(whole.grad.abs().max())), key


def test_the_same_keys_and_shapes(case: Case, tmp_path: Path) -> None:
    get_peft_model(case.base(), case.ours()).save_pretrained(tmp_path / "ours")
    unchanged = field_quietly(lambda: peft.get_peft_model(case.base(), case.field()))
    field_quietly(lambda: unchanged.save_pretrained(tmp_path / "field"))
    ours, field = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "field"))
    asked_for = {k for k in field if k.endswith("base_layer.weight")}  # the field copies adapted embeddings
    asked_for |= {k for k in field if over_again(k)}
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in field.items() if k not in asked_for}


@pytest.mark.parametrize("name", ["llama-patterns", "gpt2-all-bias", "plain-conv", "t5-prompt", "llama-projected"])
def test_the_fields_folder_saved_again_is_the_fields(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = field_stirred(case)
    expected = field_logits(model)
    field_quietly(lambda: model.save_pretrained(tmp_path / "field"))
    PeftModel.from_pretrained(case.base(), tmp_path / "field").save_pretrained(tmp_path / "again")
    assert far(field_logits(field_loaded(case.base(), tmp_path / "again")), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2-prompt", "gpt2-prefix", "llama-prefix", "gpt2-lora"])
def test_masks_and_generation(name: str, tmp_path: Path) -> None:
    """The padded row is left out: the field numbers its positions from the padding on."""
    case = CASES[name]
    view = stirred(case)
    view.save_pretrained(tmp_path)
    model = field_loaded(case.base(), tmp_path)
    tokens, mask = ids(), torch.ones(3, 7, dtype=torch.long)
    tokens[1, :3], mask[1, :3] = 0, 0
    ours = view(input_ids=tokens, attention_mask=mask).logits
    theirs = field_quietly(lambda: model(input_ids=tokens, attention_mask=mask)).logits[:, -7:]
    assert far(ours[[0, 2]], theirs[[0, 2]]) < 1e-5
    generated = view.generate(input_ids=tokens[:1], max_new_tokens=6, do_sample=False)
    theirs = field_quietly(lambda: model.generate(input_ids=tokens[:1], max_new_tokens=6, do_sample=False))
    assert torch.equal(generated, theirs)


def test_a_prefix_of_zeros_is_the_fields() -> None:
    case = prefix("llama", init_weights="zero")
    model = field_quietly(lambda: peft.get_peft_model(case.base(), case.field())).eval()
    assert far(logits(get_peft_model(case.base(), case.ours()).eval()), field_logits(model)) < 1e-5


# ---- other readers ---------------------------------------------------------------------------------------------------


def test_transformers_own_loader(tmp_path: Path) -> None:
    base = MODELS["llama"]()
    base.save_pretrained(tmp_path / "base")
    view = get_peft_model(base, coadapt.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    stir(view.adapters)
    expected = logits(view.eval())
    view.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    field_quietly(lambda: model.load_adapter(str(tmp_path / "adapter")))
    assert far(logits(model.eval()), expected) < 1e-5
    whole = field_quietly(lambda: peft.AutoPeftModelForCausalLM.from_pretrained(_named(tmp_path)))
    assert far(logits(whole.eval()), expected) < 1e-5


def _named(folder: Path) -> str:
    file = folder / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "base_model_name_or_path": str(folder / "base")}))
    return str(folder / "adapter")


def test_trained_on_after_the_field_equals_the_field(tmp_path: Path) -> None:
    """One step of plain SGD on the same folder, in both libraries."""
    case = CASES["llama-patterns"]
    field_quietly(lambda: field_stirred(case).save_pretrained(tmp_path))
    ours = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    theirs = field_quietly(lambda: peft.PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True))
    for model in (ours, theirs):
        model.train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
    assert far(logits(ours.eval()), field_logits(theirs.eval())) < 1e-5


def test_an_embedding_that_was_changed_in_the_file_is_not_dropped(tmp_path: Path) -> None:
    """The field copies an adapted embedding into its file; where it is not this base's, the adapter brings its rows."""
    case = CASES["llama-embedding"]
    model = field_stirred(case)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    tokens = ids()
    tokens[:, 3] = 5
    expected = field_logits(model, tokens)
    field_quietly(lambda: model.save_pretrained(tmp_path))
    base = case.base()
    before = base.get_input_embeddings().weight.clone()
    assert far(logits(PeftModel.from_pretrained(base, tmp_path), tokens), expected) < 1e-5
    assert torch.equal(base.get_input_embeddings().weight, before)
