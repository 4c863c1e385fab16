"""Each adapter has its own rate, warm-up, decay and clipping: held against the formulas, step by step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import models
from coadapt import LoraConfig, PeftModel, get_peft_model
from coadapt.training.trainer import AdapterTrainer, Rates

ROWS = [{"input_ids": [1, 5, 9, 7, 2], "labels": [1, 5, 9, 7, 2]}] * 8


def view() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="slow")
    model.add_adapter("fast", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter(["slow", "fast"])
    return model


class Spy(TrainerCallback):
    """Rates and parameters around every step."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.gradients: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        self.gradients.append({name: norm(model, name) for name in ("slow", "fast")})


def norm(model: PeftModel, name: str) -> float:
    gradients = [p.grad for p in model.get_adapter(name).parameters() if p.grad is not None]
    return math.sqrt(sum(float(g.square().sum()) for g in gradients))


def weight(model: PeftModel, name: str) -> torch.Tensor:
    return model.get_adapter(name).weight.detach()


def trained(
    out: Path, rates: dict[str, Rates], steps: int = 6, **options: Any
) -> tuple[PeftModel, Spy, AdapterTrainer]:
    model, spy = view(), Spy()
    arguments = {"lr_scheduler_type": "linear", "optim": "sgd", "max_grad_norm": 0.0, **options}
    trainer = AdapterTrainer(
        model=model,
        rates=rates,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            dataloader_pin_memory=False,
            use_cpu=True,
            **arguments,
        ),
        train_dataset=ROWS,  # type: ignore[arg-type]  a list is a dataset
        data_collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]},
        callbacks=[spy],
    )
    trainer.train()
    return model, spy, trainer


def test_each_adapter_follows_its_own_warm_up_and_peak(out: Path) -> None:
    rates = {"slow": Rates(learning_rate=1e-3, warmup_steps=3), "fast": Rates(learning_rate=1e-1, warmup_steps=0.5)}
    _, spy, _ = trained(out, rates, steps=8)
    slow = [1e-3 * min(step / 3, (8 - step) / (8 - 3)) for step in range(8)]
    fast = [1e-1 * min(step / 4, (8 - step) / (8 - 4)) for step in range(8)]
    assert [r["slow"] for r in spy.rates] == pytest.approx(slow)
    assert [r["fast"] for r in spy.rates] == pytest.approx(fast)


def test_clipping_one_adapter_leaves_the_other_s_gradient_whole(out: Path) -> None:
    rates = {"slow": Rates(learning_rate=1.0, max_grad_norm=1e-4), "fast": Rates(learning_rate=1.0)}
    before = view()
    after, spy, trainer = trained(out, rates, steps=1, lr_scheduler_type="constant")
    moved = {name: float((weight(after, name) - weight(before, name)).norm()) for name in rates}
    assert spy.gradients[0]["slow"] > 1e-3
    assert moved["slow"] == pytest.approx(1e-4, rel=1e-2)
    assert moved["fast"] == pytest.approx(spy.gradients[0]["fast"], rel=1e-4)
    assert trainer.monitor.figures["slow"]["grad_norm"] == pytest.approx(spy.gradients[0]["slow"], rel=1e-5)


def test_decay_is_of_the_adapter_that_asks_for_it(out: Path) -> None:
    rates = {
        "slow": Rates(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1e-9),
        "fast": Rates(learning_rate=0.1, max_grad_norm=1e-9),
    }
    before = view()
    after, _, _ = trained(out, rates, steps=1, lr_scheduler_type="constant")
    old, new = weight(before, "slow"), weight(after, "slow")
    assert torch.allclose(new, old * (1 - 0.1 * 0.5), atol=1e-7)
    assert torch.allclose(weight(after, "fast"), weight(before, "fast"), atol=1e-7)


def test_the_log_has_the_figures_of_each_adapter(out: Path) -> None:
    rates = {"slow": Rates(learning_rate=1e-3), "fast": Rates(learning_rate=1e-1)}
    _, spy, trainer = trained(out, rates, steps=2)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["learning_rate/fast"] for line in lines] == pytest.approx([r["fast"] for r in spy.rates])
    assert [line["grad_norm/slow"] for line in lines] == pytest.approx([g["slow"] for g in spy.gradients], rel=1e-5)


def test_an_adapter_without_a_rate_is_refused(out: Path) -> None:
    with pytest.raises(ValueError, match="No rate is given for fast"):
        trained(out, {"slow": Rates(learning_rate=1e-3)}, steps=1)


def test_clipping_of_all_together_is_refused(out: Path) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0: set it to 0"):
        trained(out, {"slow": Rates(learning_rate=1e-3)}, max_grad_norm=1.0)
