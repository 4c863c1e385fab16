"""P1, P2, P6, P12: several adapters on one model, each of them applied, trained and saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import CASES
from coadapt import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from coadapt.config import PeftConfig
from models import gpt2, ids, llama, logits, stir, t5
from steps import alone, error, gradients, loss

LORA, PROMPT = CASES["lora"], CASES["prompt"]


def test_p1_prompt_over_lora_trains_and_saves_both(make: Callable[..., Any], tmp_path: Path) -> None:
    view = get_peft_model(make(), LORA, adapter_name="lora")
    view.add_adapter("task", PROMPT)
    view.set_adapter("lora + task")
    loss(view).backward()
    assert gradients(view, "lora").norm() > 0
    assert gradients(view, "task").norm() > 0
    view.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    for name in ("lora", "task"):
        assert torch.equal(again.get_adapter(name).weight, view.get_adapter(name).weight)
    assert torch.equal(logits(again), logits(view.eval()))


@pytest.mark.parametrize("first, second", [(PROMPT, LORA), (LORA, PROMPT)])
def test_p2_default_names_apply_both(make: Callable[..., Any], first: PeftConfig, second: PeftConfig) -> None:
    view = get_peft_model(make(), first)
    assert get_peft_model(view, second) is view
    names = view.active_adapters
    assert len(names) == 2
    both = logits(view)
    for name in names:
        assert error(logits(view, adapters=name), both) > 1e-4, f"{name} alone is what both give"
    explicit = get_peft_model(make(), second, adapter_name="second")
    explicit.add_adapter("first", first)
    for new, old in zip(("first", "second"), names, strict=True):
        explicit.get_adapter(new).load_state_dict(view.get_adapter(old).state_dict())
    assert error(logits(explicit, adapters="first + second"), both) < 1e-6


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "prompt"])
def test_p6_rows_are_honoured_by_every_method(make: Callable[..., Any], method: str) -> None:
    view = get_peft_model(make(), CASES[method], adapter_name="a")
    view.add_adapter("b", CASES[method])
    stir(view.adapters)
    tokens = ids(4)
    mixed = logits(view, tokens, adapter_names=["a", "b", None, "a + b"])
    rows = [
        *[logits(alone(make, view, n), tokens) for n in "ab"],
        logits(make(), tokens),
        logits(view, tokens, adapters="a + b"),
    ]
    for i, single in enumerate(rows):
        assert error(mixed[i], single[i]) < 2e-6, f"row {i}"
    assert error(mixed[0], rows[2][0]) > 1e-3


def test_p6_rows_of_unequal_prompts(make: Callable[..., Any]) -> None:
    view = get_peft_model(make(), PromptTuningConfig(num_virtual_tokens=2), adapter_name="short")
    view.add_adapter("long", PromptTuningConfig(num_virtual_tokens=5))
    mixed = logits(view, ids(3), adapter_names=["short", "long", None])
    for i, name in enumerate(("short", "long", None)):
        single = logits(make() if name is None else alone(make, view, name), ids(3)[i : i + 1])
        assert error(mixed[i], single[0]) < 2e-6, name


def test_p12_two_prefixes_are_one_of_both_lengths(make: Callable[..., Any]) -> None:
    """One softmax over both: the sum equals a single prefix that holds the blocks of both."""
    view = get_peft_model(make(), PrefixTuningConfig(num_virtual_tokens=2), adapter_name="a")
    view.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=3))
    stir(view.adapters, by=0.5)
    one = get_peft_model(make(), PrefixTuningConfig(num_virtual_tokens=5))
    with torch.no_grad():
        pairs = (view.get_adapter(n).named_parameters() for n in "ab")
        for (path, first), (_, second) in zip(*pairs, strict=True):
            one.get_adapter("default").get_parameter(path).copy_(torch.cat([first, second]))
    expected = logits(one)
    assert error(logits(view, adapters=["a", "b"]), expected) < 1e-6
    assert error(logits(view, adapters="a >> b"), expected) < 1e-6
    assert error(logits(view, adapters="a"), expected) > 1e-4


@pytest.mark.parametrize("make_one", [llama, gpt2, t5])
def test_p12_two_prefixes_generate(make_one: Callable[..., Any]) -> None:
    view = get_peft_model(make_one(), PrefixTuningConfig(num_virtual_tokens=2), adapter_name="a")
    view.add_adapter("b", PrefixTuningConfig(num_virtual_tokens=3))
    stir(view.adapters, by=0.5)
    view.set_adapter(["a", "b"])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = view.generate(ids(2), **options, use_cache=True)
    assert torch.equal(cached, view.generate(ids(2), **options, use_cache=False))


def test_p1_order_of_adding_changes_nothing(make: Callable[..., Any]) -> None:
    configs = {
        "lora": LoraConfig(r=4, init_lora_weights=False, init_seed=1),
        "task": PromptTuningConfig(num_virtual_tokens=3, init_seed=2),
    }
    results = []
    for order in (["lora", "task"], ["task", "lora"]):
        view = get_peft_model(make(), configs[order[0]], adapter_name=order[0])
        view.add_adapter(order[1], configs[order[1]])
        view.set_adapter("lora + task")
        loss(view).backward()
        results.append([logits(view).detach(), *[gradients(view, n) for n in configs]])
    for first, second in zip(*results, strict=True):
        assert error(first, second) < 1e-6
