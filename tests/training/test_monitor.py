"""What is said of each adapter's movement is what its parameters did; one that stands still is named, with a reason."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

import models
import steps
from coadapt import (
    BottleneckConfig,
    Learned,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    Seq,
    Sum,
    TokenRouter,
    get_peft_model,
)
from coadapt.training import memory
from coadapt.training.log import figures_in, values_in
from coadapt.training.monitor import LOGGED_STEPS, Monitor, Stillness, gate_values, teller
from coadapt.training.spikes import Spike, begins, spike
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
    def trained(
        model: PeftModel,
        rates: dict[str, Rates],
        *callbacks: TrainerCallback,
        kind: type[AdapterTrainer] = AdapterTrainer,
        tell: Any = None,
        **options: Any,
    ) -> Lines:
        usual = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
        arguments: dict[str, Any] = {**usual, **options}
        trainer = kind(
            model=model,
            rates=rates,
            args=TrainingArguments(
                output_dir=str(out),
                max_grad_norm=0.0,
                per_device_train_batch_size=2,
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=True,
                **arguments,
            ),
            train_dataset=ROWS,  # type: ignore[arg-type]  a list is a dataset
            data_collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]},
            callbacks=list(callbacks),
        )
        trainer.monitor.tell = tell or trainer.monitor.tell
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


def split() -> PeftModel:
    """LoRA, DoRA with a bias beside it, a bottleneck with a norm, and a prompt that a network makes."""
    torch.manual_seed(0)
    model = get_peft_model(models.gpt2(), LoraConfig(r=2, target_modules=["c_attn"]), adapter_name="lora")
    dora = LoraConfig(r=2, target_modules=["mlp.c_fc"], use_dora=True, bias="lora_only")
    model.add_adapter("dora", dora)
    model.add_adapter("bottleneck", BottleneckConfig(bottleneck_size=3, adapter_layer_norm="before", scaling="learned"))
    model.add_adapter("p", PromptEncoderConfig(num_virtual_tokens=2))
    model.set_adapter(["lora", "dora", "bottleneck", "p"])
    return model


KINDS = {
    "lora": {"A": ".A", "B": ".B"},
    "dora": {"A": ".change.A", "B": ".change.B", "m": ".m", "delta": ".delta"},
    "bottleneck": {"down": ".down.", "up": ".up.", "norm": ".before.", "scale": ".scale"},
    "p": {"embedding": ".embedding", "mlp": ".mlp."},
}
"""Adapter -> kind -> what its parameters, and no others of the adapter, have in their names."""


class Named(TrainerCallback):
    """Every adapter's parameters and gradients by name, around the last step."""

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in model.adapters.named_parameters()}
        self.gradients = {n: p.grad.clone() for n, p in model.adapters.named_parameters()}

    def on_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.after = {n: p.detach().clone() for n, p in model.adapters.named_parameters()}


def test_each_kind_of_parameter_has_norms_of_its_own(trained: Train) -> None:
    spy = Named()
    line = trained(split(), {name: Rates(learning_rate=1e-2) for name in KINDS}, spy, max_steps=3)[-1]
    for adapter, kinds in KINDS.items():
        mine = {n for n in spy.after if n.startswith(f"{adapter}.")}
        found = {
            k.split(".")[1].split("/")[0] for k in line if k.startswith("grad_norm.") and k.endswith(f"/{adapter}")
        }
        assert found == set(kinds)
        for kind, part in kinds.items():
            names = [n for n in mine if part in n]
            assert names
            mine -= set(names)
            gradient = steps.flat(spy.gradients[n] for n in names).norm()
            update = steps.flat(spy.after[n] - spy.before[n] for n in names).norm()
            now = steps.flat(spy.after[n] for n in names).norm()
            assert update > 0
            assert line[f"grad_norm.{kind}/{adapter}"] == pytest.approx(float(gradient), rel=1e-4)
            assert line[f"update_norm.{kind}/{adapter}"] == pytest.approx(float(update), rel=1e-4)
            assert line[f"update_ratio.{kind}/{adapter}"] == pytest.approx(float(update / now), rel=1e-4)
        assert not mine
    assert figures_in(line)["lora"].keys() == {
        "learning_rate",
        "grad_norm",
        "update_norm",
        "update_ratio",
        "effective_rank",
    }


def test_one_kind_alone_is_the_adapter_itself(trained: Train) -> None:
    [line] = trained(view(), BOTH, max_steps=1)
    assert {k for k in line if "norm." in k and k.endswith("/two")} == set()


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


# ---- gates -----------------------------------------------------------------------------------------------------------


def named(*names: str) -> PeftModel:
    model = get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["v_proj"]))
    return model


def test_gates_are_named_by_what_they_stand_before() -> None:
    model = named("a", "b", "c")
    inner = Sum("b", "c", weights=[Learned(0.5), 1.0])
    model.set_adapter(Seq(Sum("a", inner, weights=[Learned(2.0), Learned(3.0)]), "c"))
    assert gate_values(model) == pytest.approx({"a": 2.0, "b": 0.5, "b + c": 3.0})
    model.set_adapter(
        Seq(Sum("a", weights=[Learned(2.0)]), Sum(Seq("b", "a"), "a", weights=[Learned(4.0), Learned(5.0)]))
    )
    assert gate_values(model) == pytest.approx({"a": 2.0, "b >> a": 4.0, "a #2": 5.0})
    both = Learned(0.25)
    model.set_adapter(Sum("a", "b", weights=[both, both]))
    assert gate_values(model) == pytest.approx({"a": 0.25, "b": 0.25})
    model.set_adapter("a + 0.5*b")
    assert gate_values(model) == {}


def test_routers_tell_the_mean_of_what_they_chose_since_they_were_last_asked() -> None:
    model = get_peft_model(models.llama(), LoraConfig(r=2), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2))
    model.add_adapter("c", LoraConfig(r=2))
    model.set_adapter(Sum("a", Seq("b", "c"), weights=TokenRouter(activation="sigmoid")))
    with torch.no_grad():
        for site in model.gates[0].sites.values():
            site.network.weight.zero_()
            site.network.bias.copy_(torch.tensor([0.75, 0.25]).logit())
    assert gate_values(model) == {}
    model.train()(models.ids())
    assert gate_values(model) == pytest.approx({"a": 0.75, "b >> c": 0.25})
    assert gate_values(model) == {}


def test_learned_gates_are_followed_over_time_and_by_trackers(trained: Train, out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: list[dict[str, float]] = []

    class Gates(TrainerCallback):
        def on_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            one, two = (float(gate.log_gate.detach().exp()) for gate in model.gates)
            seen.append({"one": one, "two": two})

    model = view()
    model.set_adapter(Sum("one", "two", weights=[Learned(0.5), Learned(2.0)]))
    rates = {**BOTH, "gates": Rates(learning_rate=0.1)}
    lines = trained(model, rates, Gates(), max_steps=4, report_to="tensorboard")
    assert [values_in(line, "gate") for line in lines] == [pytest.approx(gates) for gates in seen]
    assert len({line["gate/one"] for line in lines}) == 4
    [events] = (out / "runs").iterdir()
    tracker = EventAccumulator(str(events)).Reload()
    names = ("gate/one", "gate/two", "loss_spikes", "grad_norm.A/one", "update_ratio.B/one", "effective_rank/two")
    for name in names:
        told = {event.step: event.value for event in tracker.Scalars(f"train/{name}")}
        assert told == pytest.approx({line["step"]: line[name] for line in lines if name in line}, rel=1e-6), name


# ---- losses and gradients that go wrong ------------------------------------------------------------------------------


def naive(losses: list[float]) -> list[int]:
    """Where spikes are, by NumPy and the rule as it is written."""
    found = []
    for i, loss in enumerate(losses):
        before = np.array(losses[max(0, i - 20) : i])
        if len(before) >= 8:
            level = np.median(before)
            mad = np.median(np.abs(before - level))
            if loss > level + max(6 * 1.4826 * mad, abs(level) / 2):
                found.append(i)
    return found


def test_spikes_are_those_of_the_rule() -> None:
    random = np.random.default_rng(0)
    falling = 4 * np.exp(-np.arange(200) / 40) + 0.5 + 0.05 * random.standard_normal(200)
    assert [i for i in range(1, 201) if spike(list(falling[:i]))] == naive(list(falling)) == []
    falling[[5, 60, 61, 150]] += 3.0
    losses = [float(loss) for loss in falling]
    at = [i for i in range(200) if spike(losses[: i + 1])]
    assert at == naive(losses) == [60, 61, 150]
    assert [i for i in range(200) if begins(losses[: i + 1])] == [60, 150]
    stays = [1.0] * 20 + [5.0] * 20
    assert [i for i in range(40) if spike(stays[: i + 1])] == naive(stays) == list(range(20, 30))
    assert spike([-1.0] * 9 + [-0.6]) is None
    assert spike([-1.0] * 9 + [-0.4]) == Spike(-0.4, -1.0, -0.5)


class Jump(AdapterTrainer):
    """A trainer whose loss is ten times as high in one step."""

    at = 12

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        return 10 * loss if self.state.global_step + 1 == self.at else loss


def test_a_spike_is_told_once_counted_and_noted(trained: Train, out: Path) -> None:
    tell, text, log = said(out)
    lines = trained(view(), BOTH, max_steps=15, kind=Jump, tell=tell)
    [event] = [json.loads(line) for line in log.read_text().splitlines()]
    before = [line["loss"] for line in lines[:11]]
    level = float(np.median(before))
    assert event["step"] == 12
    assert event["event"] == "loss_spike"
    assert (event["loss"], event["level"]) == pytest.approx((lines[11]["loss"], level))
    assert text.getvalue().count("The loss jumped to") == 1
    assert event["warning"] in text.getvalue()
    assert [line["loss_spikes"] for line in lines] == [0] * 11 + [1] * 4


class Break(TrainerCallback):
    """Has an adapter's gradient overflow in the third step."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_pre_optimizer_step(self, *args: Any, model: Any, **__: Any) -> None:
        self.before = {n: p.detach().clone() for n, p in model.adapters.named_parameters()}
        if args[1].global_step == 2:
            next(model.get_adapter(self.name).parameters()).grad[0, 0] = float("inf")


def test_a_gradient_that_is_not_finite_stops_before_anything_is_changed(trained: Train, out: Path) -> None:
    model, breaks = view(), Break("two")
    tell, text, log = said(out)
    with pytest.raises(ValueError, match=r"gradient of 'two' is not finite at step 3, .*not made\. That of 'one' is\."):
        trained(model, BOTH, breaks, logging_steps=50, tell=tell)
    [event] = [json.loads(line) for line in log.read_text().splitlines()]
    assert (event["step"], event["event"], event["adapter"]) == (3, "gradient_not_finite", "two")
    assert text.getvalue().startswith("warning: The gradient of 'two' is not finite: ")
    assert all(torch.equal(p, breaks.before[n]) for n, p in model.adapters.named_parameters())
    with pytest.raises(ValueError, match=r"of 'one', 'two' is not .* It is so for all that trains: the loss"):
        trained(model, BOTH, breaks, Break("one"))


def test_a_loss_that_is_not_finite_is_told(out: Path) -> None:
    tell, _, log = said(out)
    monitor = Monitor(view())
    monitor.tell = tell
    assert monitor.levels(4, float("nan"), [{"loss": 1.0, "loss_spikes": 2}])["loss_spikes"] == 2
    assert json.loads(log.read_text()) == {
        "step": 4,
        "event": "loss_not_finite",
        "warning": "The loss is nan at step 4.",
    }


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
