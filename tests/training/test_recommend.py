"""`coadapt.recommended`: one table with the command line, and values that a model can be trained with at once."""

import io
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from coadapt import LoraConfig, get_peft_model, recommended
from coadapt.training.assemble import adapter_config
from coadapt.training.options import OTHERS, RECOMMENDED, SMALL, default_rate, methods
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from models import gpt2, ids

NAMES = ("lora", "dora", "prompt", "prefix", "p-tuning", "bottleneck", "ia3", "ln-tuning", "bitfit", "full-copy")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_with_what_is_recommended(name: str) -> None:
    view = get_peft_model(gpt2(), LoraConfig(r=2), adapter_name="other")
    found = recommended(name, view)
    view.add_adapter("task", found.config)
    view.set_adapter("task")
    optimizer = torch.optim.AdamW(view.param_groups({"task": found.learning_rate}), weight_decay=found.weight_decay)
    tokens, losses = ids(4), []
    for _ in range(4):
        losses.append(view(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_uses_the_same(name: str) -> None:
    run = RunConfig(model="m", data="d", method=name).with_rates(SMALL)
    [adapter] = run.adapters.values()
    found = recommended(name)
    own = {**adapter_config("default", adapter, "causal-lm").to_dict(), "task_type": None}
    assert own == found.config.to_dict()
    decay = run.weight_decay if adapter.weight_decay is None else adapter.weight_decay
    rates = (found.learning_rate, found.weight_decay, found.warmup_steps)
    assert rates == (adapter.learning_rate, decay, run.warmup_steps)


def test_the_size_of_the_base_decides_and_its_adapters_do_not_count() -> None:
    large, small = (nn.Linear(SMALL // 10, 10, bias=False, device="meta"), nn.Linear(9, 9, device="meta"))
    assert recommended("lora", large) == recommended("lora")
    assert recommended("lora", small).learning_rate == RECOMMENDED["lora"].small
    base = gpt2()
    view = get_peft_model(base, recommended("lora", base).config)
    assert recommended("lora", view) == recommended("lora", base)


def test_what_it_shows() -> None:
    found = recommended("LoRA")
    assert repr(found) == (
        "Recommended(lora: learning_rate=0.0002 (arXiv:2106.09685, GPT-3), weight_decay=0, warmup_steps=0.03, "
        "config=LoraConfig(target_modules='all-linear', r=16, lora_alpha=32))"
    )
    with pytest.raises(FrozenInstanceError):
        found.learning_rate = 1.0  # type: ignore[misc]


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"method='lroa' is unknown\. Did you mean .*'lora'"):
        recommended("lroa")
    with pytest.raises(TypeError, match="a torch model or None, not a str"):
        recommended("lora", "gpt2")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "option", "flag"),
    [
        ("adaption_prompt", "adapter_layers", "--adapter-layers VALUE"),
        ("cpt", "cpt_token_ids", "--cpt-token-ids VALUE"),
        ("trainable_tokens", "token_indices", "--token-indices VALUE"),
    ],
)
def test_what_a_method_does_not_go_without_is_asked_for(method: str, option: str, flag: str) -> None:
    asked = rf"{method} does not go without .*{option} \(.+\)\. On the command line: .*{flag}\."
    with pytest.raises(ValueError, match=rf"recommended: {asked}"):
        recommended(method)
    [adapter] = RunConfig(model="m", data="d", method=method).adapters.values()
    with pytest.raises(ValueError, match=rf"adapters\.a: {asked}"):
        adapter_config("a", adapter, "causal-lm")


def test_xlora_is_a_composition_of_a_run() -> None:
    with pytest.raises(ValueError, match=r"recommended: xlora mixes LoRAs .* 'xlora_router\(a, b, hidden_size=N\)'"):
        recommended("xlora")


def test_a_method_without_a_line_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RECOMMENDED, "ia3")  # type: ignore[arg-type]
    assert recommended("ia3").learning_rate == default_rate("ia3")[0] == OTHERS.learning_rate


def test_every_method_has_a_larger_rate_on_a_small_base() -> None:
    for name in {*methods()} - {"trainable_tokens"}:  # whose published rate is of two tokens
        assert default_rate(name, SMALL - 1)[0] > default_rate(name, SMALL)[0] == default_rate(name)[0], name


def test_the_table_of_the_page_is_the_one_in_use() -> None:
    page = (Path(__file__).parents[2] / "docs" / "learning_rates.md").read_text("utf-8")
    first = page.partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.count(" | ") == 4]
    shown = {row[0]: (float(row[1]), float(row[3])) for row in rows if row[0] in RECOMMENDED}
    assert shown == {name: (d.learning_rate, d.small) for name, d in RECOMMENDED.items()}


def test_a_run_writes_down_the_rate_that_it_found_and_resumes_with_no_other(base: str, rows: str, out: Path) -> None:
    def go(**settings: Any) -> None:
        given: dict[str, Any] = {"use_cpu": True, "eval_split": 0, "r": 2, **settings}
        run = RunConfig(model=base, data=rows, output_dir=str(out), **given)
        train(run, Console(file=io.StringIO()))

    go(max_steps=1)
    said = yaml.safe_load((out / "run.yaml").read_text())
    assert said["adapters"]["default"]["learning_rate"] == RECOMMENDED["lora"].small
    go(max_steps=2, resume=True)
    go(max_steps=1, learning_rate=7e-5, overwrite_output_dir=True)
    with pytest.raises(ValueError, match=r"a run with other settings.*\n.*7e-05.* then, "):
        go(max_steps=2, resume=True)
