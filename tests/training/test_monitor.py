"""What is said of each adapter's movement is what its parameters did; one that stands still is named, with a reason."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

import models
from coadapt import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from coadapt.training import memory
from coadapt.training.monitor import LOGGED_STEPS, Stillness, figures_in, teller
from coadapt.training.trainer import AdapterTrainer, Rates

ROWS = [{"input_ids": [1, 5, 9, 7, i % 60], "labels": [1, 5, 9, 7, i % 60]} for i in range(14)]
BOTH = {"one": Rates(learning_rate=1e-2), "two": Rates(learning_rate=1e-3)}


def view() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", PromptTuningConfig(num_virtual_tokens=3))
    model.set_adapter(["one", "two"])
    return model


class Parameters(TrainerCallback):
    """Adapter -> its parameters as one vector, and its gradient, before and after every step."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.after: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, float]] = []

    def _now(self, model: Any) -> dict[str, torch.Tensor]:
        return {name: model.get_adapter(name).weight.detach().clone() for name in ("one", "two")}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.before.append(self._now(model))
        norms = {n: [p.grad.norm() for p in model.get_adapter(n).parameters()] for n in ("one", "two")}
        self.gradients.append({name: float(torch.stack(found).norm()) for name, found in norms.items()})

    def on_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.after.append(self._now(model))


Lines = list[dict[str, Any]]


@pytest.fixture
def trained(out: Path) -> Callable[..., Lines]:
    def trained(model: PeftModel, rates: dict[str, Rates], *callbacks: TrainerCallback, **options: Any) -> Lines:
        arguments: dict[str, Any] = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", **options}
        trainer = AdapterTrainer(
            model=model,
            rates=rates,
            args=TrainingArguments(
                output_dir=str(out),
                max_grad_norm=0.0,
                per_device_train_batch_size=2,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=True,
                **arguments,
            ),
            train_dataset=ROWS,  # type: ignore[arg-type]  a list is a dataset
            data_collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]},
            callbacks=list(callbacks),
        )
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    return trained


Train = Callable[..., Lines]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}])
def test_norms_are_those_of_the_gradients_and_of_what_the_step_changed(trained: Train, options: dict[str, Any]) -> None:
    spy = Parameters()
    rates = {"one": Rates(learning_rate=1e-2, max_grad_norm=1e-3), "two": Rates(learning_rate=1e-3)}
    lines = trained(view(), rates, spy, **options)
    assert len(lines) == 6
    for line, before, after, gradient in zip(lines, spy.before, spy.after, spy.gradients, strict=True):
        found = figures_in(line)
        for name in ("one", "two"):
            update = float((after[name] - before[name]).norm())
            assert update > 0
            assert found[name]["grad_norm"] == pytest.approx(gradient[name], rel=1e-4)
            assert found[name]["update_norm"] == pytest.approx(update, rel=1e-4)
            assert found[name]["update_ratio"] == pytest.approx(update / float(after[name].norm()), rel=1e-4)
        assert line["peak_memory_gib"] > 0.05


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_steps": 4, "max_steps": 10, "logging_first_step": True}, [1, 4, 8]),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, [7, 14]),
        (
            {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 4},
            [2, 4],
        ),
    ],
)
def test_every_line_of_the_log_has_them_and_no_other_step_costs_a_copy(
    trained: Train, options: dict[str, Any], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[bool] = []
    measure = AdapterTrainer._will_log

    def counted(trainer: AdapterTrainer) -> bool:
        copies.append(measure(trainer))
        return copies[-1]

    monkeypatch.setattr(AdapterTrainer, "_will_log", counted)
    lines = trained(view(), BOTH, **options)
    assert [line["step"] for line in lines] == steps
    assert all("update_norm/two" in line for line in lines)
    assert sum(copies) - len(steps) in (0, 1, 2)
    assert sum(copies) < len(copies)


def said(out: Path) -> tuple[Callable[[int, str], None], io.StringIO, Path]:
    text, log = io.StringIO(), out / "metrics.jsonl"
    out.mkdir(exist_ok=True)
    return teller(Console(file=text, width=200), log), text, log


def gateless(model: PeftModel) -> None:
    model.set_adapter("one + 0*two")


def alone(model: PeftModel) -> None:
    model.set_adapter("one")


def frozen(model: PeftModel) -> None:
    for parameter in model.get_adapter("two").parameters():
        parameter.requires_grad_(False)


class Freeze(TrainerCallback):
    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        frozen(model)


def nothing(model: PeftModel) -> None: ...


@pytest.mark.parametrize(
    ("change", "rate", "callbacks", "what"),
    [
        (alone, 1e-3, (), r"'two' stands still: its gradient is 0 .* it is not in the composition 'one'"),
        (gateless, 1e-3, (), r"its gradient is 0 .* its gate in one . 0.two is 0, or no row of the data uses it"),
        (nothing, 1e-3, (Freeze(),), r"its gradient is 0 .* it is frozen"),
        (nothing, 0.0, (), r"its updates have norm 0.0e\+00 .* its learning rate is 0\."),
        (nothing, 1e-14, (), r"its updates have norm 0.0e\+00 .* 1\.0e-14 is too small to change its parameters"),
        (
            nothing,
            1e-8,
            (),
            r"its updates have norm .* its learning rate 1\.0e-08; 'one' at 1\.0e-02 moves .* times as far",
        ),
    ],
)
def test_an_adapter_that_stands_still_is_named_once_with_the_reason(
    trained: Train, out: Path, change: Callable[[PeftModel], None], rate: float, callbacks: Any, what: str
) -> None:
    model = view()
    change(model)
    tell, text, log = said(out)
    rates = {"one": Rates(learning_rate=1e-2), "two": Rates(learning_rate=rate)}
    watch = Stillness(model, tell)
    trained(model, rates, *callbacks, watch, max_steps=LOGGED_STEPS + 2, lr_scheduler_type="constant")
    [line] = [json.loads(line) for line in log.read_text().splitlines()]
    assert line["step"] == LOGGED_STEPS
    assert "'one' stands" not in text.getvalue()
    assert re.search(what, line["warning"]), line["warning"]
    assert line["warning"] in text.getvalue()
    assert (watch.stands_still("one"), watch.stands_still("two")) == (False, True)


def test_two_that_move_are_not_spoken_of(trained: Train, out: Path) -> None:
    model = view()
    tell, text, _ = said(out)
    # Nothing moves in the first step of a warm-up, and rates may differ by as much as published ones do.
    rates = {"one": Rates(learning_rate=1e-4, warmup_steps=3), "two": Rates(learning_rate=0.3, warmup_steps=3)}
    trained(model, rates, Stillness(model, tell), max_steps=8)
    assert text.getvalue() == ""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_the_forecast_is_what_is_held_after_a_step(kind: Any) -> None:
    model = view()
    optimizer = kind(model.param_groups({"one": 1e-2, "two": 1e-3}))
    told = memory.forecast(model.get_base_model(), model.adapters.parameters(), optimizer)
    model(torch.ones(1, 4, dtype=torch.long), labels=torch.ones(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    base = {t.data_ptr(): t.nbytes for t in (*model.get_base_model().parameters(), *model.get_base_model().buffers())}
    assert told.optimizer == sum(v.nbytes for v in states)
    assert told.gradients == told.adapters == sum(g.nbytes for g in gradients)
    assert told.base == sum(base.values())
    assert "without activations" in str(told)


def test_an_optimiser_that_cannot_be_asked_is_unknown() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("real tensors only")

    model = view()
    told = memory.forecast(model.get_base_model(), model.adapters.parameters(), Odd(model.param_groups({"one": 1.0})))
    assert told.optimizer is None
    assert "without optimiser states and activations" in str(told)
    assert "optimiser states unknown" in str(told)
