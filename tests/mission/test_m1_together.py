"""M1: one model, soft prompt and LoRA together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

from coadapt import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, recommended
from coadapt.training.trainer import AdapterTrainer, Rates
from models import bloom, gpt2, ids, llama, logits, stir, t5
from steps import error, gradients, loss

RATES = {"lora": {"lr": 1e-2, "weight_decay": 0.1}, "task": 3e-1}


def mixed(base: nn.Module | None = None) -> PeftModel:
    model = get_peft_model(
        llama() if base is None else base, LoraConfig(r=4, init_lora_weights=False, init_seed=1), adapter_name="lora"
    )
    model.add_adapter("task", PromptTuningConfig(num_virtual_tokens=3, init_seed=2))
    model.set_adapter("lora + task")
    return model


def steps(model: PeftModel, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    found = []
    for seed in seeds:
        value = loss(model, ids(seed=seed))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(value.detach()))
    return found


@pytest.mark.parametrize("make", [llama, gpt2, bloom, t5])
def test_m1_1_both_train_in_one_backward(make: Any) -> None:
    model = mixed(make())
    loss(model).backward()
    assert gradients(model, "lora").norm() > 0
    assert gradients(model, "task").norm() > 0
    assert all(p.grad is None for p in model.get_base_model().parameters())


@pytest.mark.parametrize("make", [llama, gpt2, bloom])
def test_m1_1_one_call_equals_both_by_hand(make: Any) -> None:
    """The prompt's embeddings joined by hand, through a base whose weights were changed by hand."""
    model, base = mixed(make()), make()
    model.set_adapter("task")
    with torch.no_grad():
        for part in model.get_adapter("lora").parts:
            lora: Any = part.method
            change = lora.scale * lora.B @ lora.A
            weight = base.get_submodule(part.place.path).weight
            weight += change.T if make is gpt2 else change
        prompt = model.get_adapter("task").weight.view(1, 3, -1).expand(3, -1, -1)
        embeds = torch.cat([prompt, base.get_input_embeddings()(ids())], dim=1)
        expected = base(inputs_embeds=embeds).logits[:, 3:]
    assert error(logits(model, adapters=["lora", "task"]), expected) < 1e-5
    assert error(logits(model), expected) > 1e-3


def test_m1_2_nothing_has_to_be_reactivated() -> None:
    model = get_peft_model(llama(), LoraConfig(r=4), adapter_name="lora")
    before = [p.requires_grad for p in model.get_adapter("lora").parameters()]
    model.add_adapter("task", PromptTuningConfig(num_virtual_tokens=3))
    model.set_adapter("task")
    assert [p.requires_grad for p in model.get_adapter("lora").parameters()] == before == [True] * 8
    model.freeze("lora")
    model.add_adapter("third", LoraConfig(r=2))
    model.set_adapter(["lora", "third"])
    assert model.trainable() == ["task", "third"]


def test_m1_3_never_wrapped_twice() -> None:
    base = llama()
    first = get_peft_model(base, LoraConfig(r=4))
    assert get_peft_model(first, PromptTuningConfig(num_virtual_tokens=3)) is first
    assert first.get_base_model() is base
    assert not any(isinstance(module, PeftModel) for module in first.modules() if module is not first)
    assert list(base.state_dict()) == list(llama().state_dict())


def test_m1_4_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Six steps at once, and three, a save, a load and three more: the same numbers to the bit, the optimiser's too."""
    unbroken = mixed()
    unbroken.freeze("task")
    whole = steps(unbroken, torch.optim.AdamW(unbroken.param_groups({"lora": 1e-2})), range(6))
    model = mixed()
    model.freeze("task")
    optimizer = torch.optim.AdamW(model.param_groups({"lora": 1e-2}))
    first = steps(model, optimizer, range(3))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert again.trainable() == ["lora"]
    assert torch.equal(logits(again), logits(model))
    restored = torch.optim.AdamW(again.param_groups())
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert [(g["name"], g["lr"]) for g in restored.param_groups] == [("lora", 1e-2)]
    assert first + steps(again, restored, range(3, 6)) == whole
    assert torch.equal(again.get_adapter("lora").weight, unbroken.get_adapter("lora").weight)


@pytest.mark.parametrize("make", [gpt2, bloom, t5])
def test_m1_4_one_folder_for_the_mix(make: Any, tmp_path: Path) -> None:
    model = mixed(make())
    stir(model.adapters)
    model.set_adapter("lora + 0.5*task")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again), logits(model.eval()))
    assert again.trainable() == []
    assert PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).trainable() == ["lora", "task"]
    alone = PeftModel.from_pretrained(make(), tmp_path / "lora")
    assert torch.equal(logits(alone), logits(model, adapters="lora"))


def test_m1_5_each_adapter_has_its_rate_and_decay() -> None:
    """One step of plain gradient descent moves every adapter by its own rate, and decays it by its own share."""
    model = mixed()
    loss(model).backward()
    start = {n: model.get_adapter(n).weight.detach().clone() for n in RATES}
    grad = {n: gradients(model, n) for n in RATES}
    groups = model.param_groups(RATES)
    assert [g["name"] for g in groups] == ["lora", "task"]
    torch.optim.SGD(groups, lr=1.0).step()
    expected = {
        "lora": start["lora"] - 1e-2 * (grad["lora"] + 0.1 * start["lora"]),
        "task": start["task"] - 3e-1 * grad["task"],
    }
    for name in RATES:
        assert error(model.get_adapter(name).weight - start[name], expected[name] - start[name]) < 1e-4


def test_m1_4_rates_are_saved_with_the_adapters(tmp_path: Path) -> None:
    model = mixed()
    model.param_groups({"lora": 1e-3, "task": 0.3})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert {g["name"]: g.get("lr") for g in again.param_groups()} == {"lora": 1e-3, "task": 0.3}


def one_step(tmp_path: Path, **rates: Rates) -> dict[str, Tensor]:
    """How far one step of a run moves each adapter."""
    model = mixed()
    start = {n: model.get_adapter(n).weight.detach().clone() for n in rates}
    rows = [{"input_ids": row, "labels": row} for row in ids(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", optim="sgd", max_grad_norm=0.0, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    AdapterTrainer(model=model, rates=rates, args=arguments, train_dataset=rows).train()
    return {n: model.get_adapter(n).weight.detach() - start[n] for n in rates}


def test_m1_5_each_adapter_has_its_clipping_and_warm_up(tmp_path: Path) -> None:
    free = one_step(tmp_path, lora=Rates(learning_rate=0.5), task=Rates(learning_rate=0.5))
    limit = float(free["lora"].norm()) / 0.5 / 4
    held = one_step(
        tmp_path, lora=Rates(learning_rate=0.5, max_grad_norm=limit), task=Rates(learning_rate=0.5, warmup_steps=10)
    )
    assert held["lora"].norm() == pytest.approx(0.5 * limit, rel=1e-3)
    assert error(held["lora"] * 4, free["lora"]) < 1e-3
    assert held["task"].norm() == 0 < free["task"].norm()


def test_m1_5_the_default_rate_of_a_prompt_is_25_to_100_times_a_loras() -> None:
    assert 25 <= recommended("prompt").learning_rate / recommended("lora").learning_rate <= 100


def test_m1_6_a_text_starts_the_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    base = llama()
    text = "act as a poet"
    for length in (3, 4, 10):
        config = PromptTuningConfig(
            prompt_tuning_init="TEXT", prompt_tuning_init_text=text, num_virtual_tokens=length,
            tokenizer_name_or_path=str(tmp_path),
        )  # fmt: skip
        prompt = get_peft_model(base, config).get_adapter("default").weight.view(length, -1)
        tokens = (tokenizer(text)["input_ids"] * 3)[:length]
        assert torch.equal(prompt, base.get_input_embeddings()(torch.tensor(tokens)))


def test_m1_6_sampled_from_the_vocabulary() -> None:
    base = llama()
    config = PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=6)
    first, second = (get_peft_model(base, config).get_adapter("default").weight.view(6, -1) for _ in range(2))
    table = base.get_input_embeddings().weight
    for row in (*first, *second):
        assert (table == row).all(1).any()
    assert not torch.equal(first, second)


def test_m1_6_random() -> None:
    base = llama()
    prompt = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=200)).get_adapter("default").weight
    spread = base.get_input_embeddings().weight.std()
    assert prompt.std().item() == pytest.approx(spread.item(), rel=0.1)
