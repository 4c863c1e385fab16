"""The stock transformers.Trainer, unmodified, trains a view."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from models import bert, ids, llama, logits, t5
from steps import error, flat


def mixed(make: Any = llama) -> PeftModel:
    """LoRA with dropout, so that the generator's state matters, and a prompt."""
    view = get_peft_model(make(), LoraConfig(r=4, lora_dropout=0.1, init_seed=1), adapter_name="lora")
    view.add_adapter("task", PromptTuningConfig(num_virtual_tokens=3, init_seed=2))
    view.set_adapter("lora + task")
    return view


def rows(count: int = 16, **columns: list[Any]) -> Dataset:
    return Dataset.from_dict({"input_ids": ids(count).tolist(), "labels": ids(count).tolist(), **columns})


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
    }
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **{**usual, **options})


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("make", [llama, t5])
def test_checkpoints_hold_only_the_adapters(make: Any, tmp_path: Path) -> None:
    view = mixed(make)
    Trainer(model=view, args=arguments(tmp_path), train_dataset=rows()).train()
    stored = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    stored.pop("_extra_state")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in view.adapters.parameters())
    assert torch.equal(
        flat(stored[k] for k in sorted(stored)), flat(v for k, v in sorted(view.state_dict().items()) if k in stored)
    )
    size = sum(p.stat().st_size for p in (tmp_path / "checkpoint-6").glob("*.safetensors"))
    assert size < 8 * sum(t.numel() for t in stored.values()) + 20_000
    assert torch.equal(flat(view.get_base_model().parameters()), flat(make().parameters()))


def test_resume_equals_an_unbroken_run(tmp_path: Path) -> None:
    whole = Trainer(model=mixed(), args=arguments(tmp_path / "whole"), train_dataset=rows())
    whole.train()
    resumed = Trainer(model=mixed(), args=arguments(tmp_path / "again"), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert torch.equal(flat(resumed.model.adapters.parameters()), flat(whole.model.adapters.parameters()))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """A rate that ruins the adapter: the best checkpoint is an early one, and it is what the view holds in the end."""
    view = mixed()
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 10.0,
    }
    trainer = Trainer(model=view, args=arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows(4))
    trainer.train()
    seen = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    best = min(seen, key=lambda step: seen[step])
    assert best != 6, "the probe needs a best step before the last"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen[best], rel=1e-6)
    stored = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in view.state_dict().items() if k != "_extra_state")


def test_from_pretrained_loads_what_save_model_wrote(tmp_path: Path) -> None:
    view = mixed()
    trainer = Trainer(model=view, args=arguments(tmp_path / "run"), train_dataset=rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert "training_args.bin" in files(tmp_path / "saved"), "a pickle lies beside it, and is not opened"
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-6"):
        again = PeftModel.from_pretrained(llama(), folder)
        assert again.active_adapters == ["lora", "task"]
        assert torch.equal(logits(again), logits(view.eval()))
        assert again.trainable() == []
    assert PeftModel.from_pretrained(llama(), tmp_path / "saved", is_trainable=True).trainable() == ["lora", "task"]


def collate(batch: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Tensors as they are; names of adapters stay a list."""
    found = list(batch)
    return {k: [r[k] for r in found] if k == "adapter_names" else torch.tensor([r[k] for r in found]) for k in found[0]}


def two_tasks() -> PeftModel:
    view = get_peft_model(llama(), LoraConfig(r=4, init_seed=1), adapter_name="a")
    view.add_adapter("b", LoraConfig(r=4, init_seed=2))
    return view


def test_adapter_names_as_a_column_train_each_rows_own(tmp_path: Path) -> None:
    """Rows of two tasks in one batch; each adapter ends where it would with its own rows alone."""
    names, options = (
        ["a", "b"] * 8,
        {"optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no", "per_device_train_batch_size": 16},
    )
    view = two_tasks()
    Trainer(
        model=view, args=arguments(tmp_path, **options, learning_rate=0.2), train_dataset=rows(adapter_names=names),
        data_collator=collate,
    ).train()  # fmt: skip
    for name in "ab":
        again = two_tasks()
        mask = [row == name for row in names]
        labels = [row if mine else [-100] * 7 for row, mine in zip(ids(16).tolist(), mask, strict=True)]
        data = Dataset.from_dict({"input_ids": ids(16).tolist(), "labels": labels})
        again.set_adapter(name)
        start = again.get_adapter(name).weight.detach().clone()
        # the mean over half of the tokens is twice as large
        Trainer(model=again, args=arguments(tmp_path, **{**options, "learning_rate": 0.1}), train_dataset=data).train()
        moved = again.get_adapter(name).weight - start
        assert error(view.get_adapter(name).weight - start, moved) < 1e-3


def test_extra_columns_are_dropped(tmp_path: Path) -> None:
    """A column that the base's forward does not take does no harm, as with any model."""
    with_columns = Trainer(model=mixed(), args=arguments(tmp_path), train_dataset=rows(text=["word"] * 16))
    with_columns.train()
    plain = Trainer(model=mixed(), args=arguments(tmp_path), train_dataset=rows())
    plain.train()
    assert losses(with_columns) == losses(plain)


def test_classification_trains_and_saves_its_head(tmp_path: Path) -> None:
    view = get_peft_model(bert(), LoraConfig(r=4, task_type="SEQ_CLS"))
    data = Dataset.from_dict({"input_ids": ids(16).tolist(), "labels": [i % 3 for i in range(16)]})
    trainer = Trainer(model=view, args=arguments(tmp_path), train_dataset=data)
    trainer.train()
    again = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-6")
    assert torch.equal(logits(again), logits(view.eval()))
    with view.disable_adapter():
        assert torch.equal(logits(view), logits(bert()))
    assert error(logits(view), logits(bert())) > 1e-3


def test_gradient_checkpointing_by_argument(tmp_path: Path) -> None:
    name = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    runs = []
    for options in ({}, {name: True}):
        view = get_peft_model(llama(), PrefixTuningConfig(num_virtual_tokens=3, init_seed=1))
        trainer = Trainer(model=view, args=arguments(tmp_path, **options), train_dataset=rows())
        trainer.train()
        runs.append(torch.tensor(losses(trainer)))
    assert error(runs[1], runs[0]) < 1e-5


def test_quantised_looking_bases_are_taken(tmp_path: Path) -> None:
    """Trainer refuses to train a quantised base without adapters; a view has some."""
    base = llama()
    base.is_quantized = True
    base.hf_quantizer = type(
        "Quantizer", (), {"is_trainable": True, "is_qat_trainable": False, "quantization_config": None}
    )()
    view = get_peft_model(base, LoraConfig(r=4))
    found: Tensor = (
        Trainer(model=view, args=arguments(tmp_path, save_strategy="no"), train_dataset=rows()).train().training_loss
    )  # type: ignore[assignment]
    assert found > 0
