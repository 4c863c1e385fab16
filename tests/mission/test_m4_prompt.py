"""M4: Prompt Tuning in practice: the article's script on a small BLOOM, with transformers' own Trainer."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import coadapt
from coadapt import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from models import bloom, ids, logits
from steps import error, gradients, loss


@pytest.fixture
def bloomz(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    """A folder with a model and its tokenizer, as it would come from a hub."""
    folder = tmp_path / "bloomz"
    bloom().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def generations(model: Any, **inputs: Any) -> list[torch.Tensor]:
    """Greedy, sampled and with beams."""
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.95},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2, "early_stopping": True},
    ]
    found = []
    for way in ways:
        torch.manual_seed(0)
        found.append(model.generate(**inputs, **way, max_new_tokens=6, min_new_tokens=6))
    return found


def test_m4_1_and_m4_2_the_articles_script(bloomz: str, sentences: list[str], tmp_path: Path) -> None:
    model_name, output_directory = bloomz, str(tmp_path / "peft_outputs")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    foundational_model = AutoModelForCausalLM.from_pretrained(model_name)
    data = Dataset.from_dict({"act": sentences, "prompt": sentences})
    data = data.map(lambda samples: tokenizer(samples["prompt"]), batched=True)
    train_sample = data.remove_columns("act")

    generation_config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, prompt_tuning_init="RANDOM", num_virtual_tokens=4,
        tokenizer_name_or_path=model_name,
    )  # fmt: skip
    peft_model_prompt = get_peft_model(foundational_model, generation_config)
    assert peft_model_prompt.get_nb_trainable_parameters()[0] == 4 * 32
    start = peft_model_prompt.get_adapter("default").weight.clone()

    training_args = TrainingArguments(
        output_dir=output_directory, use_cpu=True, auto_find_batch_size=True, learning_rate=0.05, num_train_epochs=12,
        logging_steps=1, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = Trainer(
        model=peft_model_prompt,
        args=training_args,
        train_dataset=train_sample,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    trained = peft_model_prompt.get_adapter("default").weight
    assert error(trained, start) > 0.1

    trainer.model.save_pretrained(f"{output_directory}/prompt")
    fresh = AutoModelForCausalLM.from_pretrained(model_name)
    loaded_model_prompt = PeftModel.from_pretrained(fresh, f"{output_directory}/prompt", is_trainable=False)
    assert torch.equal(loaded_model_prompt.get_adapter("default").weight, trained)

    tokenizer.padding_side = "left"
    inputs = tokenizer(["i want you to act as a", "write a"], return_tensors="pt", padding=True)
    found = generations(loaded_model_prompt, **inputs)
    for way, cached, uncached in zip(
        "gsb", found, generations(loaded_model_prompt, **inputs, use_cache=False), strict=True
    ):
        assert torch.equal(cached, uncached), way
    length = inputs["input_ids"].shape[1]
    assert [tuple(f.shape) for f in found] == [(2, length + 6), (2, length + 6), (4, length + 6)]
    for row in range(2):
        alone = tokenizer(["i want you to act as a", "write a"][row], return_tensors="pt")
        single = loaded_model_prompt.generate(**alone, do_sample=False, max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(single[0, -6:], found[0][row, -6:])
    with loaded_model_prompt.disable_adapter():
        assert torch.equal(generations(loaded_model_prompt, **inputs)[0], generations(bloom(), **inputs)[0])


@pytest.mark.parametrize("count", [4, 20])
def test_m4_2_generate_needs_no_input_mask(count: int) -> None:
    model = get_peft_model(bloom(), PromptTuningConfig(num_virtual_tokens=count))
    for cached, uncached in zip(
        generations(model, input_ids=ids(2)), generations(model, input_ids=ids(2), use_cache=False), strict=True
    ):
        assert torch.equal(cached, uncached)


def test_m4_2_each_generated_token_is_the_one_of_the_whole_text() -> None:
    """Greedy generation against the argmax of one forward over everything."""
    model = get_peft_model(bloom(), PromptTuningConfig(num_virtual_tokens=4))
    text = model.generate(ids(2), do_sample=False, max_new_tokens=8, min_new_tokens=8, eos_token_id=None)
    whole = logits(model, text).argmax(-1)
    assert torch.equal(text[:, 7:], whole[:, 6:-1])


def test_m4_3_versions_are_recorded(tmp_path: Path) -> None:
    get_peft_model(bloom(), PromptTuningConfig(num_virtual_tokens=4)).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "provenance.json").read_text("utf-8"))["versions"]
    assert said["transformers"] == transformers.__version__
    assert said["torch"] == torch.__version__
    assert said["coadapt"] == coadapt.__version__
    assert said["python"] == platform.python_version()


def test_m4_4_arguments_of_a_run_reach_the_trainer(tmp_path: Path) -> None:
    from coadapt.training.run import training_arguments
    from coadapt.training.settings import RunConfig

    given: dict[str, Any] = {
        "use_cpu": True,
        "auto_find_batch_size": True,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 2,
    }
    run = RunConfig(model="m", data="d", method="prompt", learning_rate=0.03, **given)
    arguments = training_arguments(run, tmp_path, evaluates=False)
    assert {name: getattr(arguments, name) for name in given} == given
    assert [a.learning_rate for a in run.adapters.values()] == [0.03]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_m4_5_half_precision_bases_train_fp32_prompts(dtype: torch.dtype) -> None:
    """Gradients of a half-precision base are those of the same weights in fp32, to that precision."""
    half = bloom().to(dtype)
    model = get_peft_model(half, PromptTuningConfig(num_virtual_tokens=4, init_seed=1))
    assert {p.dtype for p in model.get_adapter("default").parameters()} == {torch.float32}
    exact = get_peft_model(bloom().to(dtype).float(), PromptTuningConfig(num_virtual_tokens=4, init_seed=1))
    exact.get_adapter("default").load_state_dict(model.get_adapter("default").state_dict())
    for view in (model, exact):
        (1000 * loss(view).float()).backward()  # small gradients vanish in fp16
    assert error(gradients(model, "default"), gradients(exact, "default")) < 0.05


def test_m4_5_mixed_precision_of_the_trainer(tmp_path: Path) -> None:
    model = get_peft_model(bloom(), PromptTuningConfig(num_virtual_tokens=4, init_seed=1))
    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=True, max_steps=6, learning_rate=0.05, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert model.get_adapter("default").weight.dtype == torch.float32
