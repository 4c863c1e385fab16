"""What must act between the steps of its training does so by itself in every loop, or says that it cannot."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from byte_tokenizer import save_base
from coadapt import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from coadapt.core import driving
from coadapt.core.method import METHODS, Driven
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from laws.setting import EVERY
from models import ids, llama, mixtral

MODEL: Any = AutoModelForCausalLM.from_pretrained
STEPS = 9
SCHEDULE: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2, "lora_alpha": 8}
RATE = 0.02


def config(**options: Any) -> AdaLoraConfig:
    return AdaLoraConfig(total_step=STEPS, init_seed=1, task_type="CAUSAL_LM", **{**SCHEDULE, **options})


def fresh(**options: Any) -> PeftModel:
    return get_peft_model(llama(), config(**options)).train()


def methods(view: PeftModel) -> list[Any]:
    return [part.method for part in view.get_adapter("default").parts]


def values(view: PeftModel) -> list[Tensor]:
    return [p.detach().clone() for p in view.get_adapter("default").parameters()]


def left(view: PeftModel) -> int:
    """Ranks that are not zero, of all layers together."""
    return sum(int((m.E != 0).sum()) for m in methods(view))


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, 60, (4, 7), generator=generator)


def loss_of(view: Any, tokens: Tensor) -> Tensor:
    return view(input_ids=tokens, labels=tokens).loss


def adam(view: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in view.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)


def plain_steps(view: PeftModel, optimizer: torch.optim.Optimizer, steps: range, parts: int = 1) -> list[int]:
    """A plain loop; how many ranks were left after each step."""
    found: list[int] = []
    for step in steps:
        for part in batch(step).chunk(parts):
            (loss_of(view, part) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(left(view))
    return found


# ---- the published schedule ------------------------------------------------------------------------------------------


def slowly(steps: int) -> tuple[list[Tensor], list[int]]:
    """AdaLoRA's Algorithm 1, parameter by parameter, by an optimiser that nothing is hooked into: SGD by hand."""
    view = fresh(inference_mode=True)
    view.get_adapter("default").requires_grad_(True)
    view.get_adapter("default").steps = None  # nobody drives it
    every = [(m, name, getattr(m, name)) for m in methods(view) for name in ("E", "A", "B")]
    mean = [torch.zeros_like(p) for _, _, p in every]
    deviation = [torch.zeros_like(p) for _, _, p in every]
    kept: list[Tensor] = []
    found: list[int] = []
    for t in range(1, steps + 1):
        orthogonality = torch.zeros(())
        for m in methods(view):
            orthogonality = orthogonality + (m.A @ m.A.mT - torch.eye(4)).norm() + (m.B.mT @ m.B - torch.eye(4)).norm()
        (loss_of(view, batch(t)) + 0.5 * orthogonality / (2 * len(methods(view)))).backward()
        with torch.no_grad():
            for i, (_, _, p) in enumerate(every):
                assert p.grad is not None
                sensitivity = (p * p.grad).abs()
                mean[i] = 0.85 * mean[i] + 0.15 * sensitivity
                deviation[i] = 0.85 * deviation[i] + 0.15 * (sensitivity - mean[i]).abs()
                p -= RATE * p.grad
                p.grad = None
            scores: list[tuple[float, int, int]] = []
            for site in range(len(methods(view))):
                e, a, b = (mean[3 * site + k] * deviation[3 * site + k] for k in range(3))
                for rank in range(4):
                    row, column = a[rank].tolist(), b[:, rank].tolist()
                    score = float(e[rank]) + math.fsum(row) / len(row) + math.fsum(column) / len(column)
                    scores.append((score, site, rank))
            budget = {4: 4, 6: 2, 7: 2}.get(t)  # of 2 n + 2 n (1 - (t - 2) / 5)^3, n layers
            if budget is not None:
                share = 1 - (t - 2) / 5
                allowed = int(len(methods(view)) * (2 + 2 * share**3))
                best = {(s, r) for _, s, r in sorted(scores, reverse=True)[:allowed]}
                kept = [torch.tensor([(s, r) in best for r in range(4)])[:, None] for s in range(len(methods(view)))]
            if budget is not None or t > 7:
                for m, mask in zip(methods(view), kept, strict=True):
                    m.E.mul_(mask)
        found.append(left(view))
    return values(view), found


def test_ranks_fall_as_published() -> None:
    """Sensitivities, their means, scores, budget and the term of orthogonality, in the slow way of the paper."""
    expected, ranks = slowly(STEPS)
    view = fresh()
    optimizer = torch.optim.SGD(view.get_adapter("default").parameters(), lr=RATE)
    found = []
    for step in range(1, STEPS + 1):
        found += plain_steps(view, optimizer, range(step, step + 1))
    assert found == ranks
    sites = len(methods(view))
    assert found[:3] == [4 * sites] * 3
    assert found[3] == int(sites * (2 + 2 * 0.6**3))
    assert found[6:] == [2 * sites] * 3
    for one, other in zip(values(view), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_layers_end_with_different_ranks() -> None:
    view = fresh()
    plain_steps(view, adam(view), range(1, STEPS + 1))
    assert len({int((m.E != 0).sum()) for m in methods(view)}) > 1


def test_the_term_of_orthogonality_is_in_the_gradients_once() -> None:
    """Whatever the accumulation: at the step they are those of loss + 0.5 * the term."""
    seen: list[list[Tensor]] = []
    for parts in (1, 4):
        view = fresh(init_lora_weights=False)
        parameters = list(view.get_adapter("default").parameters())
        for part in batch(1).chunk(parts):
            (loss_of(view, part) / parts).backward()
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.step()
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])
    view = fresh(init_lora_weights=False)
    parameters = list(view.get_adapter("default").parameters())
    term = torch.stack(
        [(m.A @ m.A.mT - torch.eye(4)).norm() + (m.B.mT @ m.B - torch.eye(4)).norm() for m in methods(view)]
    ).sum() / (2 * len(methods(view)))
    pull = torch.autograd.grad(0.5 * term, parameters, retain_graph=True, allow_unused=True)
    assert max(float(g.norm()) for g in pull if g is not None) > 1e-2
    exact = torch.autograd.grad(loss_of(view, batch(1)) + 0.5 * term, parameters)
    for gradients in seen:
        for one, other in zip(gradients, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- every loop ------------------------------------------------------------------------------------------------------


def trainer(view: PeftModel, out: Path, **options: Any) -> Trainer:
    tokens = [row.tolist() for step in range(1, STEPS + 1) for row in batch(step)]
    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
    }
    arguments = TrainingArguments(
        str(out),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy=options.pop("save_strategy", "no"),
        **{**usual, **options},
    )
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    return Trainer(model=view, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stock_trainer_and_a_plain_loop_do_the_same(accumulation: int, tmp_path: Path) -> None:
    view, other = fresh(), fresh()
    plain_steps(view, adam(view), range(1, STEPS + 1), accumulation)
    options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer(other, tmp_path, **options).train()
    assert left(other) == 2 * len(methods(other))
    for one, two in zip(values(view), values(other), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_coadapt_train_fills_in_the_length_and_drives(tmp_path: Path) -> None:
    """15 rows in batches of 4, two of them a step: two steps an epoch, five in two and a half."""
    base, rows = save_base(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{a}+1=", "completion": f" {a + 1}"}) + "\n" for a in range(15)))
    adalora = {"method": "adalora", "init_r": 4, "target_r": 2, "target_modules": ["q_proj", "v_proj"]}
    adapters: Any = {"default": adalora}
    run = RunConfig(
        model=str(base),
        data=str(rows),
        adapters=adapters,
        num_train_epochs=2.5,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        eval_split=0,
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
    )
    train(run, Console(quiet=True))
    view = PeftModel.from_pretrained(MODEL(base), tmp_path / "out", is_trainable=True)
    sites = len(methods(view))
    assert view.peft_config["default"].total_step == int(view.get_adapter("default").steps) == 5
    assert left(view) == 2 * sites
    resumed = json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())
    assert resumed["max_steps"] == 5


# ---- stopped and gone on with ----------------------------------------------------------------------------------------


def test_resumed_from_a_trainers_checkpoint(tmp_path: Path) -> None:
    whole, again = fresh(), fresh()
    trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=5).train()
    resumed = trainer(again, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert left(again) == 2 * len(methods(again))
    assert all(map(torch.equal, values(again), values(whole)))


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_trainers_checkpoint_is_loaded_for_either(is_trainable: bool, tmp_path: Path) -> None:
    view = fresh()
    trainer(view, tmp_path, save_strategy="steps", save_steps=STEPS).train()
    again = PeftModel.from_pretrained(llama(), tmp_path / f"checkpoint-{STEPS}", is_trainable=is_trainable)
    assert all(map(torch.equal, values(again), values(view)))
    assert all((method.importance is not None) == is_trainable for method in methods(again))
    assert all(parameter.requires_grad == is_trainable for parameter in again.adapters.parameters())


@pytest.mark.parametrize("stop", [3, 6, 8])
def test_saved_and_loaded_in_between(stop: int, tmp_path: Path) -> None:
    """Before ranks fall, while they do, and when they do no more: with the optimiser's state it is one run."""
    whole, view = fresh(), fresh()
    plain_steps(whole, adam(whole), range(1, STEPS + 1))
    optimizer = adam(view)
    plain_steps(view, optimizer, range(1, stop + 1))
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    other = adam(again)
    other.load_state_dict(optimizer.state_dict())
    plain_steps(again, other, range(stop + 1, STEPS + 1))
    assert all(map(torch.equal, values(again), values(whole)))


def test_loaded_for_inference_nothing_of_the_training_is_there(tmp_path: Path) -> None:
    view = fresh()
    plain_steps(view, adam(view), range(1, 4))
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert all(method.importance is None for method in methods(again))
    torch.testing.assert_close(again(input_ids=ids()).logits, view.eval()(input_ids=ids()).logits)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_being_driven(copied: Callable[[PeftModel], PeftModel]) -> None:
    whole, view = fresh(), fresh()
    plain_steps(whole, torch.optim.SGD(whole.adapters.parameters(), lr=RATE), range(1, STEPS + 1))
    plain_steps(view, torch.optim.SGD(view.adapters.parameters(), lr=RATE), range(1, 5))
    before = values(view)
    again = copied(view)
    plain_steps(again, torch.optim.SGD(again.adapters.parameters(), lr=RATE), range(5, STEPS + 1))
    assert all(map(torch.equal, values(again), values(whole)))
    assert all(map(torch.equal, values(view), before))
    assert int(view.get_adapter("default").steps) == 4


# ---- what is not driven ----------------------------------------------------------------------------------------------


def by_hand(view: PeftModel, step: int) -> None:
    loss_of(view, batch(step)).backward()
    for parameter in view.adapters.parameters():
        if parameter.grad is not None:
            parameter.data -= RATE * parameter.grad
            parameter.grad = None


def test_what_writes_parameters_by_hand_is_told_at_its_first_step() -> None:
    view = fresh()
    by_hand(view, 1)
    with pytest.raises(RuntimeError, match=r"'default' trains, but its method \(AdaLoRA\) is not told of the steps"):
        by_hand(view, 2)


def one_step(view: PeftModel) -> None:
    plain_steps(view, torch.optim.SGD(view.adapters.parameters(), lr=RATE), range(1, 2))


def on_a_thread(act: Callable[[], None]) -> None:
    """Waits for it; its error is ours."""
    with ThreadPoolExecutor(1) as threads:
        threads.submit(act).result()


def test_who_writes_by_hand_on_one_thread_hides_nothing_from_another() -> None:
    mine, other, stepped = fresh(), fresh(), fresh()
    by_hand(other, 1)
    with driving.unwatched():
        for step in range(1, 4):
            by_hand(mine, step)  # says nothing here
        with pytest.raises(RuntimeError, match="is not told of the steps"):
            on_a_thread(lambda: by_hand(other, 2))
        on_a_thread(lambda: one_step(stepped))
    by_hand(stepped, 2)
    by_hand(stepped, 3)  # a step was told of on that thread, and that is remembered here
    by_hand(mine, 4)
    with pytest.raises(RuntimeError, match="is not told of the steps"):
        by_hand(mine, 5)


def test_steps_within_what_is_written_by_hand_do_not_count_as_told() -> None:
    view = fresh()
    with driving.unwatched():
        one_step(view)
    by_hand(view, 2)
    with pytest.raises(RuntimeError, match="is not told of the steps"):
        by_hand(view, 3)


def test_values_that_are_loaded_are_no_step() -> None:
    view, other = fresh(), fresh(init_lora_weights=False)
    loss_of(view, batch(1)).backward()
    view.load_state_dict(other.state_dict())
    loss_of(view, batch(1)).backward()


def test_a_step_that_is_skipped_is_none() -> None:
    """As a GradScaler does it where gradients overflow: gradients come and go, and nothing is written."""
    view = fresh()
    for step in range(1, 4):
        loss_of(view, batch(step)).backward()
        view.zero_grad()
    assert int(view.get_adapter("default").steps) == 0
    assert plain_steps(view, adam(view), range(1, STEPS + 1))[-1] == 2 * len(methods(view))


def test_scaled_gradients_are_refused() -> None:
    view = fresh()
    optimizer = adam(view)
    loss_of(view, batch(1)).backward()
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]  # what a GradScaler leaves to a fused one
    with pytest.raises(RuntimeError, match="fused=False"):
        optimizer.step()


def test_frozen_and_inactive_adapters_are_left_alone() -> None:
    view = get_peft_model(llama(), config(), adapter_name="active").train()
    view.add_adapter("frozen", config())
    view.add_adapter("inactive", config())
    view.freeze("frozen")
    view.set_adapter(["active", "frozen"])
    optimizer = torch.optim.SGD(view.adapters.parameters(), lr=RATE)
    before = {n: view.get_adapter(n).weight.detach().clone() for n in ("frozen", "inactive")}
    for step in range(1, STEPS + 1):
        loss_of(view, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {n: int(view.get_adapter(n).steps) for n in view.peft_config} == {
        "active": STEPS,
        "frozen": 0,
        "inactive": 0,
    }
    for name, weight in before.items():
        assert torch.equal(view.get_adapter(name).weight, weight)


def test_two_adapters_have_a_schedule_each() -> None:
    view = get_peft_model(llama(), config(), adapter_name="a").train()
    view.add_adapter("b", config(target_r=1))
    alone = fresh()
    optimizer = torch.optim.SGD(view.adapters.parameters(), lr=RATE)
    for step in range(1, STEPS + 1):
        for name in ("a", "b"):
            view(input_ids=batch(step), labels=batch(step), adapters=name).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain_steps(alone, torch.optim.SGD(alone.adapters.parameters(), lr=RATE), range(1, STEPS + 1))
    assert all(map(torch.equal, [p.detach() for p in view.get_adapter("a").parameters()], values(alone)))
    ranks = [int((p.method.E != 0).sum()) for p in view.get_adapter("b").parts]
    assert sum(ranks) == len(ranks)


def test_only_driven_methods_are_followed() -> None:
    view = get_peft_model(llama(), LoraConfig(r=2))
    assert view.get_adapter("default").steps is None
    assert view.get_adapter("default") not in driving._followed


@pytest.mark.parametrize("case", [c for c, made in EVERY.items() if issubclass(METHODS[made.method], Driven)])
def test_every_driven_method_counts_its_steps(case: str) -> None:
    view = get_peft_model(mixtral() if case.endswith("-experts") else llama(), EVERY[case]).train()
    plain = torch.optim.SGD(view.adapters.parameters(), lr=1e-3)
    for step in range(1, 4):
        loss_of(view, batch(step)).backward()
        plain.step()
        plain.zero_grad()
    assert int(view.get_adapter("default").steps) == 3
