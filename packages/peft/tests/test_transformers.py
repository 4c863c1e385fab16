"""transformers' own methods for adapters, its Trainer and its pipelines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import llama, moved
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

import coadapt
from cases import CASES

CONFIGS = [
    peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    peft.LoraConfig(r=4, target_modules=["v_proj"], use_dora=True),
    peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["lm_head"]),
    peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
]
BEARABLE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=CONFIGS, ids=lambda c: c.method + ("-copy" if c.modules_to_save else ""))
def config(request: Any) -> Any:
    return coadapt.PeftConfig.from_dict(request.param.to_dict())


def viewed(config: Any, state: dict[str, Tensor]) -> peft.PeftModel:
    """The same adapter as a view of the same base."""
    view = peft.get_peft_model(llama(), config)
    lost, strange = peft.set_peft_model_state_dict(view, {f"base_model.model.{k}": t for k, t in state.items()})
    assert not lost and not strange
    return view.eval()


def test_added_adapters_compute_what_a_view_does(model: Any, config: Any, ids: Tensor) -> None:
    plain = model(ids).logits
    model.add_adapter(config)
    assert model.active_adapters() == ["default"]
    moved(model)
    state = model.get_adapter_state_dict()
    view = viewed(config, state)
    expected = view(ids).logits
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, expected, **BEARABLE)
    model(ids, labels=ids).loss.backward()
    view(ids, labels=ids).loss.backward()
    ours = [p.grad for p in view.get_adapter("default").parameters()]
    theirs = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **BEARABLE)
    model.disable_adapters()
    assert torch.equal(model(ids).logits, plain)
    model.enable_adapters()
    torch.testing.assert_close(model(ids).logits, expected, **BEARABLE)


def test_a_part_of_the_model_that_is_called_by_itself_is_adapted(model: Any, ids: Tensor) -> None:
    plain = model.model(ids).last_hidden_state
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    moved(model)
    states = model.model(ids).last_hidden_state
    assert not torch.allclose(states, plain, atol=1e-3)
    torch.testing.assert_close(model.lm_head(states), model(ids).logits)
    x = torch.randn(2, 3, 32)
    layer = model.model.layers[0].self_attn.q_proj
    assert not torch.allclose(layer(x), x @ layer.weight.T)


def test_what_is_saved_is_loaded_again_and_by_a_view(
    model: Any, config: Any, ids: Tensor, tmp_path: Path, base_folder: Path
) -> None:
    model.add_adapter(config, "mine")
    moved(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == config.peft_type
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in stored)
    view = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(view(ids).logits, model(ids).logits, **BEARABLE)
    again = AutoModelForCausalLM.from_pretrained(base_folder)
    told = again.load_adapter(str(tmp_path / "adapter"), "other")
    assert not told.missing_keys and not told.unexpected_keys and not told.mismatched_keys
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **BEARABLE)
    assert not any(p.requires_grad for p in again.parameters())


INJECTABLE = [n for n, c in CASES.items() if not c.is_prompt_learning and n != "bitfit"]  # no Llama has biases


@pytest.mark.parametrize("name", INJECTABLE)
def test_every_method_is_saved_and_loaded_by_transformers(ids: Tensor, tmp_path: Path, name: str) -> None:
    model = llama()
    torch.manual_seed(1)
    config: Any = coadapt.PeftConfig.from_dict(CASES[name].to_dict())
    if invocation := getattr(config, "alora_invocation_tokens", None):
        ids[:, 2 : 2 + len(invocation)] = torch.tensor(invocation)
    model.add_adapter(config)
    moved(model)
    model.save_pretrained(tmp_path)
    again = llama()
    plain, told = again(ids).logits, again.load_adapter(str(tmp_path))
    assert not told.missing_keys and not told.unexpected_keys and not told.mismatched_keys
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again(ids).logits, plain, atol=1e-4)


@pytest.mark.parametrize("name", ["lora", "a-lora", "reft"])
def test_what_an_injected_model_generates_is_what_a_view_does(ids: Tensor, name: str) -> None:
    config = coadapt.PeftConfig.from_dict(CASES[name].to_dict())
    ids = torch.cat([ids[:, :4], torch.full((2, 1), 28), ids[:, 4:]], 1)  # 28 invokes what asks for it
    model = llama()
    model.add_adapter(config)
    moved(model)
    view = viewed(config, model.get_adapter_state_dict())
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = model.eval().generate(ids, **options), view.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), **BEARABLE)
    assert not torch.allclose(torch.stack(ours.logits)[-1], torch.stack(llama().generate(ids, **options).logits)[-1])


def test_what_a_view_refuses_to_generate_is_refused(model: Any, ids: Tensor) -> None:
    model.add_adapter(coadapt.LoReftConfig(suffix_positions=1))
    with pytest.raises(ValueError, match="cache"):
        model.generate(ids, max_new_tokens=2, use_cache=False)


def test_a_folder_that_a_view_wrote_is_loaded_to_be_trained_on(ids: Tensor, tmp_path: Path) -> None:
    view = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    moved(view.get_adapter("default"))
    view.save_pretrained(tmp_path)
    model = llama()
    model.load_adapter(str(tmp_path), is_trainable=True)
    torch.testing.assert_close(model(ids).logits, view.eval()(ids).logits, **BEARABLE)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 8 and all(".default." in name for name in names)


def test_several_adapters_are_switched_summed_and_taken_away(model: Any, ids: Tensor) -> None:
    plain = model(ids).logits
    keys = set(model.state_dict())
    outs = []
    for name, module in (("a", "q_proj"), ("b", "up_proj")):
        model.add_adapter(peft.LoraConfig(r=4, target_modules=[module]), name)
        moved(model.peft_adapters.get_submodule(name))
        assert model.active_adapters() == [name]
        outs.append(model(ids).logits)
    assert all(p.requires_grad for p in model.peft_adapters.parameters())  # switching does not change what trains
    model.set_adapter(["a", "b"])
    both = model(ids).logits
    assert not torch.allclose(both, outs[0]) and not torch.allclose(both, outs[1])
    model.set_adapter("a")
    assert torch.equal(model(ids).logits, outs[0])
    model.delete_adapter("a")
    model.set_adapter("b")
    torch.testing.assert_close(model(ids).logits, outs[1])
    model.delete_adapter("b")
    assert torch.equal(model(ids).logits, plain) and set(model.state_dict()) == keys
    assert type(model).__mro__[1].__name__ != "Site" and "_coadapt_entrance" not in vars(model)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.set_adapter("a")


def test_loading_one_for_inference_leaves_what_trains(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]), "trained")
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "loaded")
    training = {name: p.requires_grad for name, p in model.peft_adapters.named_parameters()}
    assert len(training) == 8 and all(trains == name.startswith("trained.") for name, trains in training.items())


def test_a_file_that_does_not_fit_is_refused(ids: Tensor, tmp_path: Path) -> None:
    view = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    view.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.v_proj\.lora_A\.weight' is no tensor of this adapter"):
        llama().load_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, "r": 2}))
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        llama().load_adapter(str(tmp_path))


def test_what_was_injected_last_is_active(model: Any, ids: Tensor) -> None:
    for name in ("a", "b"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model, name)
        assert model.peft_adapters.active_adapters == [name]


def test_prompts_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="needs a call of the whole model"):
        model.add_adapter(peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_trains_an_added_adapter(
    model: Any, arguments: Callable[..., Any], tmp_path: Path, ids: Tensor, reentrant: bool
) -> None:
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids] * 4)
    args = arguments(
        TrainingArguments,
        max_steps=8,
        save_strategy="steps",
        save_steps=8,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.startswith("peft_adapters.")}
    view = peft.PeftModel.from_pretrained(llama(), tmp_path / "run" / "checkpoint-8")
    torch.testing.assert_close(view(ids).logits, model.eval()(ids).logits, **BEARABLE)


def test_trainer_takes_a_view_and_loads_the_best_of_it(
    arguments: Callable[..., Any], tmp_path: Path, ids: Tensor
) -> None:
    view = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    data = Dataset.from_list([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids] * 4)
    args = arguments(
        TrainingArguments,
        learning_rate=0.3,  # the last is not the best
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer = Trainer(model=view, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_pipeline(base_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    view = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    moved(view.get_adapter("default"))
    view.get_adapter("default").config.base_model_name_or_path = str(base_folder)
    folder = tmp_path / "adapter"
    view.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = {"max_new_tokens": 6, "do_sample": False}

    def said(of: Any) -> str:
        made = pipeline("text-generation", model=of, tokenizer=tokenizer)
        return made("ab", **options)[0]["generated_text"]

    by_view, by_folder = said(view.eval()), said(str(folder))
    assert by_view == by_folder != said(llama())
