"""The share of step time that the monitors take: a LoRA on all linears of a Llama, 4 layers of 512, batches of 4 x 128.

python -m benchmarks.monitors [rank]
"""

import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from coadapt import LoraConfig, get_peft_model
from coadapt.training.monitor import Monitor
from coadapt.training.trainer import AdapterTrainer, Rates

from .setting import Setting, llama

STEPS, LOGGING_STEPS = 60, 10


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self.began)


def timed(name: str) -> list[float]:
    """Seconds of each call of one of the monitor's methods, from now on."""
    call, found = getattr(Monitor, name), list[float]()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        out = call(*args, **kwargs)
        found.append(time.perf_counter() - began)
        return out

    setattr(Monitor, name, wrapped)
    return found


def main(r: int) -> None:
    """Trains, and prints what the monitors took of it. Clipping, which they do too, is counted in."""
    view = get_peft_model(llama(Setting()), LoraConfig(r=r, target_modules="all-linear"), adapter_name="task")
    rows: Any = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(0, 1000, (400, 128))]
    spent = {name: timed(name) for name in ("before_step", "after_step", "levels")}
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        AdapterTrainer(
            model=view,
            rates={"task": Rates(learning_rate=2e-4, max_grad_norm=1.0)},
            args=TrainingArguments(
                output_dir=out,
                max_steps=STEPS,
                logging_steps=LOGGING_STEPS,
                max_grad_norm=0.0,
                per_device_train_batch_size=4,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=lambda found: {k: torch.stack([row[k] for row in found]) for k in found[0]},
            callbacks=[clock],
        ).train()
    total = sum(clock.steps) + sum(spent["levels"])
    sites = len(view.get_adapter("task").parts)
    print(f"{sites} sites, r={r}, a step {1e3 * statistics.median(clock.steps):.0f} ms")
    for name, found in spent.items():
        print(f"  {name}: {len(found)} calls, at most {1e3 * max(found):.1f} ms, {sum(found) / total:.2%} of all")
    print(f"  together {sum(map(sum, spent.values())) / total:.2%}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
