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


def with_reward(arguments: Callable[..., Any], tokenizer: Any, config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    facts = {k: v for k, v in llama().config.to_dict().items() if k not in ("id2label", "label2id")}
    model = LlamaForSequenceClassification(LlamaConfig(**facts, num_labels=1))
    data = Dataset.from_list([{"prompt": "a", "chosen": "ab", "rejected": "az"}] * 4)
    args = arguments(RewardConfig)
    return RewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config)


def with_kto(arguments: Callable[..., Any], tokenizer: Any, config: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    data = Dataset.from_list([{"prompt": "a", "completion": "ab", "label": i % 2 == 0} for i in range(4)])
    args = arguments(KTOConfig)
    return KTOTrainer(model=llama(), args=args, train_dataset=data, processing_class=tokenizer, peft_config=config)


def with_grpo(arguments: Callable[..., Any], tokenizer: Any, config: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        model=llama(),
        args=arguments(GRPOConfig, num_generations=2, max_completion_length=6, beta=0.1),
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        train_dataset=Dataset.from_list([{"prompt": "ab"}] * 4),
        processing_class=tokenizer,
        peft_config=config,
    )


@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning:trl")
@pytest.mark.parametrize("made", [with_reward, with_kto, with_grpo])
def test_other_trainers_train_the_adapter_alone(arguments: Callable[..., Any], tokenizer: Any, made: Any) -> None:
    task = "SEQ_CLS" if made is with_reward else "CAUSAL_LM"
    trainer = made(arguments, tokenizer, peft.LoraConfig(**{**LORA, "task_type": task}))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lora" in n for n in changed) and all(n.startswith("adapters.") for n in changed)
