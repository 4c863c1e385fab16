"""TRL's trainers with a configuration, as its documentation has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import llama, moved
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def asked(preferred: bool = False) -> Dataset:
    rows = [{"prompt": f"{a}{a}?", "completion": f" {a}!"} for a in range(8)]
    if preferred:
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": " z!"} for r in rows]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(**LORA),
        peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    ],
    ids=lambda c: c.peft_type,
)
def test_sft(model: Any, tokenizer: Any, arguments: Callable[..., Any], tmp_path: Path, config: Any) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    args = arguments(SFTConfig, max_steps=8, save_strategy="steps", save_steps=4)
    trainer = SFTTrainer(model=model, args=args, train_dataset=asked(), processing_class=tokenizer, peft_config=config)
    assert isinstance(trainer.model, peft.PeftModel)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(losses[4:]) < sum(losses[:4])
    base = trainer.model.get_base_model()
    assert base is model and all(torch.equal(base.state_dict()[k], v) for k, v in before.items())
    folder = tmp_path / "run" / "checkpoint-8"
    assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()
    assert all(
        key.startswith("base_model.") or key == "prompt_embeddings"
        for key in load_file(folder / "adapter_model.safetensors")
    )
    again = peft.PeftModel.from_pretrained(llama(), folder)
    tokens = tokenizer("abc", return_tensors="pt").input_ids
    torch.testing.assert_close(again(tokens).logits, trainer.model.eval()(tokens).logits)


def test_sft_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(
    tokenizer: Any, arguments: Callable[..., Any], tmp_path: Path
) -> None:
    def run(**more: Any) -> Any:
        args = arguments(SFTConfig, max_steps=6, save_strategy="steps", save_steps=3, seed=3)
        config = peft.LoraConfig(**LORA, init_seed=5)
        made = SFTTrainer(
            model=llama(), args=args, train_dataset=asked(), processing_class=tokenizer, peft_config=config
        )
        made.train(**more)
        return peft.get_peft_model_state_dict(made.model)

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_dpo_with_a_config(model: Any, tokenizer: Any, arguments: Callable[..., Any]) -> None:
    args = arguments(DPOConfig, max_steps=8)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=asked(preferred=True),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**LORA),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # nothing is preferred at the start
    assert losses[-1] < losses[0]


def test_dpo_of_an_adapter_takes_a_copy_of_it_as_its_reference(
    model: Any, tokenizer: Any, arguments: Callable[..., Any]
) -> None:
    view = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    moved(view.get_adapter("default"))
    before = peft.get_peft_model_state_dict(view)
    trainer = DPOTrainer(
        model=view, args=arguments(DPOConfig), train_dataset=asked(preferred=True), processing_class=tokenizer
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    reference, trained = (peft.get_peft_model_state_dict(view, adapter_name=n) for n in ("ref", "default"))
    assert all(torch.equal(reference[key], before[key]) for key in before)
    assert any(not torch.equal(trained[key], before[key]) for key in before)
