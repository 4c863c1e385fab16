"""`layer_replication`: blocks several times, with one set of weights and a LoRA of their own each."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from coadapt import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.exporting import export
from coadapt.exporting.streaming import merge_to
from coadapt.formats.facts import read_facts
from coadapt.formats.programs import PROGRAMS
from formats.field import far, field_loaded, field_logits
from models import FAMILIES, MODELS, ids, llama, logits, stir, t5

MAP = [[0, 2], [0, 1], [1, 2]]
ORDER = (0, 1, 0, 1)
OPTIONS: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "layer_replication": MAP, "task_type": "CAUSAL_LM"}


def fresh(base: nn.Module, **options: Any) -> PeftModel:
    view = get_peft_model(base, LoraConfig(**{**OPTIONS, **options})).eval()
    stir(view.adapters)
    return view


def larger() -> Any:
    """The same model, made by hand: with weights of its own for each block."""
    base, large = llama(), llama(num_hidden_layers=len(ORDER))
    large.load_state_dict(base.state_dict(), strict=False)
    for i, k in enumerate(ORDER):
        large.model.layers[i].load_state_dict(base.model.layers[k].state_dict())
    return large


def test_it_computes_what_a_larger_model_does() -> None:
    view = fresh(llama())
    other = get_peft_model(larger(), LoraConfig(**{**OPTIONS, "layer_replication": None})).eval()
    other.get_adapter("default").load_state_dict(view.get_adapter("default").state_dict())
    assert far(logits(view), logits(other)) < 1e-6
    with view.disable_adapter():
        assert far(logits(view), logits(larger())) < 1e-6
    for model in (view, other):
        model(input_ids=ids(), labels=ids()).loss.backward()
    for one, two in zip(
        view.get_adapter("default").parameters(), other.get_adapter("default").parameters(), strict=True
    ):
        assert far(one.grad, two.grad) < 1e-6


def test_no_weight_is_there_twice_and_the_model_stays_as_it_is() -> None:
    base = llama()
    base.lm_head.weight.requires_grad_(True)
    before, expected = dict(base.named_parameters()), logits(base)
    said = base.config.to_dict()
    view = fresh(base)
    assert {id(p) for p in view.base.parameters()} == {id(p) for p in base.parameters()}
    assert len(view.base.model.layers) == 4 == view.config.num_hidden_layers
    assert torch.equal(logits(base), expected)
    assert base.config.to_dict() == said
    assert len(base.model.layers) == 2
    assert not any(p.requires_grad for p in base.parameters()), "a view freezes its base"
    view.merge_adapter()
    assert torch.equal(logits(base), expected)
    view.unmerge_adapter()
    view.unload()
    assert [n for n, p in base.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert all(p is before[n] for n, p in base.named_parameters())


def test_a_cache_has_a_place_for_each_block() -> None:
    view = fresh(llama())
    assert [layer.self_attn.layer_idx for layer in view.base.model.layers] == [0, 1, 2, 3]
    cached, without = (view.generate(ids(2), max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, without)
    assert len(view(input_ids=ids(), use_cache=True).past_key_values) == 4


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "gemma2"])
def test_folders(model: str, tmp_path: Path) -> None:
    make = (MODELS | FAMILIES)[model]
    task = None if model == "bert" else "CAUSAL_LM"
    view = fresh(make(), task_type=task)
    expected = logits(view)
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.peft_config["default"].layer_replication == MAP
    assert ("readable_by_peft" in (tmp_path / "adapter_config.json").read_text()) is (model == "gpt2")
    same = PeftModel.from_pretrained(view.get_base_model(), tmp_path)  # whose blocks are repeated already
    assert torch.equal(logits(same), expected)


def test_merged_it_is_a_model_of_its_own(tmp_path: Path) -> None:
    base = llama()
    before = {n: p.clone() for n, p in base.named_parameters()}
    view = fresh(base, target_modules=["q_proj"])
    expected = logits(view)
    merged: Any = view.merge_and_unload()
    assert far(logits(merged), expected) < 1e-6
    assert len({id(p) for p in merged.model.layers.parameters()}) == 4 * 9
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    get_peft_model(merged, LoraConfig(r=2))


def test_beside_others_and_copied(tmp_path: Path) -> None:
    view = fresh(llama())
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=3))
    view.add_adapter("more", LoraConfig(**OPTIONS))
    view.set_adapter("default + prompt + 0.5*more")
    stir(view.adapters)
    expected = logits(view)
    assert torch.equal(logits(copy.deepcopy(view)), expected)
    view.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        view = fresh(llama()).train()
        if again:
            view.activation_checkpointing_enable({"use_reentrant": False})
        view(input_ids=ids(), labels=ids()).loss.backward()
        found.append([p.grad for p in view.get_adapter("default").parameters()])
    assert all(far(one, other) < 1e-6 for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("wanted", "why"),
    [([[0, 3]], r"names block 2; 'model.layers' of LlamaForCausalLM has 2"), ([[1, 1]], r"ranges \[start, end\)")],
)
def test_ranges_that_are_not_there(wanted: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        get_peft_model(llama(), LoraConfig(layer_replication=wanted))


def test_another_replication_is_refused(tmp_path: Path) -> None:
    fresh(llama()).save_pretrained(tmp_path)
    for options in ({"layer_replication": [[0, 2], [0, 2], [0, 2]]}, {"layer_replication": None}):
        view = fresh(llama())
        with pytest.raises(ValueError, match=r"All LoRAs of a view have the same"):
            view.add_adapter("other", LoraConfig(**{**OPTIONS, **options}))
    plain = get_peft_model(llama(), LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"for layer_replication=\[\[0, 2\], \[0, 1\], \[1, 2\]\].*has None"):
        plain.load_adapter(tmp_path, "other")
    with pytest.raises(ValueError, match="put tied layers into an adapter without it"):
        LoraConfig(**OPTIONS, ensure_weight_tying=True)


def test_models_that_are_no_one_stack_are_refused() -> None:
    for base in (t5(), nn.Sequential(nn.Linear(3, 3))):
        with pytest.raises(ValueError, match="one stack of them"):
            get_peft_model(base, LoraConfig(layer_replication=MAP, target_modules=["0"]))


def test_a_merged_or_scattered_model_is_refused() -> None:
    base = llama()
    other = get_peft_model(base, LoraConfig(r=2))
    other.merge_adapter()
    with pytest.raises(RuntimeError, match=r"unmerge_adapter\(\) there first"):
        fresh(base)
    other.unload()
    add_hook_to_module(base.lm_head, ModelHook())
    with pytest.raises(ValueError, match="without device_map"):
        fresh(base)


def test_exports_and_combinations(tmp_path: Path) -> None:
    view = fresh(llama())
    view.add_adapter("more", LoraConfig(**OPTIONS))
    stir(view.get_adapter("more"))
    view.combine("default + more", adapter_name="both")
    expected = logits(view, adapters="both")
    assert far(expected, logits(view, adapters="default + more")) < 1e-5
    view.save_pretrained(tmp_path / "both", selected_adapters=["both"])
    assert far(logits(PeftModel.from_pretrained(llama(), tmp_path / "both")), expected) < 1e-6
    export(view, "peft", tmp_path / "peft", adapters="both")
    theirs = field_loaded(llama(), tmp_path / "peft")
    assert far(field_logits(theirs), expected) < 1e-5
    for target, merged in (("vllm", False), ("transformers", True)):
        with pytest.raises(ValueError, match=r"several times \(layer_replication\).*coadapt merge"):
            export(view, target, tmp_path / "no", adapters="both", merged=merged)
    with pytest.raises(ValueError, match="cannot be merged from file to file"):
        merge_to(view, tmp_path / "no")
    told = read_facts(tmp_path / "both" / "both").adapters[0]
    verdicts = {program.name: program.judge(told) for program in PROGRAMS}
    assert verdicts["peft"].reasons == []
    assert verdicts["vLLM"].reasons == ["it does not repeat blocks of the base (layer_replication)"]
    assert "coadapt merge" in str(verdicts["vLLM"].command)
