"""TRL's trainers take a view as their model, without a configuration of peft."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from beside.conftest import Make
from coadapt import LoraConfig, PeftModel
from laws.setting import close, gradients, same_gradients
from steps import flat

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"  # names of transformers that TRL still uses
)


def arguments(kind: Any, folder: Path, **options: Any) -> Any:
    usual = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    return kind(str(folder), **{**usual, **quiet, **options})


def asked() -> Dataset:
    return Dataset.from_list([{"prompt": f"{a}{a}?", "completion": f" {a}!"} for a in range(8)])


def sft(view: PeftModel, tokenizer: Any, folder: Path, **options: Any) -> SFTTrainer:
    args = arguments(SFTConfig, folder, **options)
    return SFTTrainer(model=view, args=args, train_dataset=asked(), processing_class=tokenizer)


@pytest.mark.parametrize("cases", [("lora", "prompt"), ("prefix", "bottleneck")])
def test_sft_loss_and_gradients_are_the_view_s_own(
    view_of: Make, tokenizer: Any, tmp_path: Path, cases: tuple[str, ...]
) -> None:
    """TRL takes the body's states to the head itself; that must be what the view gives as a whole."""
    trainer = sft(view_of(*cases), tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    same = view_of(*cases)
    same.load_state_dict(trainer.model.state_dict())
    expected = same(**batch).loss
    expected.backward()
    close(loss, expected, 1e-5)
    same_gradients(gradients(trainer.model), gradients(same))
    with same.disable_adapter():
        assert abs(float((same(**batch).loss - loss).detach())) > 1e-3


def test_sft_trains_and_saves_the_adapters_only(view_of: Make, tokenizer: Any, tmp_path: Path) -> None:
    view = view_of("lora", "prompt")
    base, before = flat(view.base.parameters()).clone(), flat(view.adapters.parameters()).clone()
    trainer = sft(view, tokenizer, tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    trainer.train()
    lines = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(lines[4:]) < sum(lines[:4])
    assert torch.equal(flat(view.base.parameters()), base)
    assert not torch.equal(flat(view.adapters.parameters()), before)
    stored = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert {k.partition(".")[0] for k in stored} == {"adapters", "_extra_state"}
    again = view_of("lora", "prompt")
    again.load_state_dict(stored)
    tokens = tokenizer("hello", return_tensors="pt")
    assert torch.equal(again.eval()(**tokens).logits, view.eval()(**tokens).logits)


def test_an_adapter_at_the_head_is_refused_where_trl_reads_the_head_s_weight(
    view_of: Make, tokenizer: Any, tmp_path: Path
) -> None:
    view = view_of("lora")
    view.add_adapter("head", LoraConfig(target_modules=["lm_head"]))
    tokens = tokenizer("hello", return_tensors="pt")
    states = view.base_model(**tokens).last_hidden_state
    close(view.base.lm_head(states), view(**tokens).logits)
    view.set_adapter("a + head")
    with pytest.raises(ValueError, match=r"adapter 'head' at 'lm_head' would have no part"):
        sft(view, tokenizer, tmp_path).train()


@pytest.mark.parametrize("reference", ["the base", "loaded by TRL"])
def test_dpo_with_the_base_as_its_reference(view_of: Make, tokenizer: Any, tmp_path: Path, reference: str) -> None:
    """A new LoRA is the base: the loss starts at log 2 and the rewards at 0; the base stays the reference."""
    view = view_of()
    view.add_adapter("lora", LoraConfig(r=4, init_seed=1))
    view.set_adapter("lora")
    base, before = view.get_base_model(), flat(view.base.parameters()).clone()
    rows = [{"prompt": f"{a}?", "chosen": f" {a}!", "rejected": " no"} for a in range(4)]
    trainer = DPOTrainer(
        model=view, ref_model=base if reference == "the base" else None, args=arguments(DPOConfig, tmp_path),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    assert (trainer.ref_model is base) == (reference == "the base")
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["rewards/margins"] > 0.01
    assert torch.equal(flat(base.parameters()), before)


def test_disabled_adapters_are_the_reference(view_of: Make, tokenizer: Any) -> None:
    """What DPO with one model does by hand: the reference's log-probabilities with the adapters off."""
    view = view_of("lora", "prompt", "prefix")
    tokens = tokenizer("hello", return_tensors="pt")
    reference = view.get_base_model()(**tokens).logits.log_softmax(-1)
    with view.disable_adapter():
        assert torch.equal(view(**tokens).logits.log_softmax(-1), reference)
        assert torch.equal(view.base_model(**tokens).last_hidden_state, view.base.base_model(**tokens)[0])
    assert not torch.equal(view(**tokens).logits.log_softmax(-1), reference)
