"""A forecast holds against what a real run has alive at most, and against naive ways to find the same figures."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

import coadapt
import models
from byte_tokenizer import save_base
from coadapt.demo import BASE
from coadapt.training import memory
from coadapt.training.estimate import MOST, Estimate, estimate, largest_batch, usable
from coadapt.training.estimate_table import tables
from coadapt.training.live import Live
from coadapt.training.memory import Room
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.training.units import size

CLOSE = 0.1


def written(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Rows of two lengths, so that any batch of eight has a longest one and padding."""
    return written(
        tmp_path / "pairs.jsonl", [{"prompt": "a" * (9 + 20 * (i % 2)), "completion": "b"} for i in range(24)]
    )


def peak_of_a_run(out: Path, **settings: Any) -> int:
    """Bytes of live tensors at most, weights and data and all, while `coadapt train` runs."""
    # From the second step on the optimiser has its states.
    run = RunConfig(output_dir=str(out), num_train_epochs=2, save_strategy="no", logging_steps=1, **settings)
    with Live(read=True) as live:
        train(run, Console(quiet=True))
    return live.peak


def held_to(out: Path, **settings: Any) -> Estimate:
    found = estimate(use_cpu=True, **settings)
    real = peak_of_a_run(out, use_cpu=True, **settings)
    rss = size(memory.resident())
    print(
        f"forecast {size(found.peak)} ({found.step.phase}), live {size(real)}, {found.peak / real - 1:+.1%}, RSS {rss}"
    )
    assert found.peak == pytest.approx(real, rel=CLOSE)
    return found


DEMO: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lora + prompt, checkpointed, bf16": {"method": "lora + prompt", "gradient_checkpointing": True, "bf16": True},
    "full copy of a row": {"method": "full-copy", "per_device_train_batch_size": 1},
    "prefix": {"method": "prefix"},
    "accumulated": {"method": "lora + bottleneck", "gradient_accumulation_steps": 2},
    "ia3, adafactor": {"method": "ia3", "optim": "adafactor"},
    "dora with dropout": {"method": "dora", "lora_dropout": 0.1},
    "p-tuning": {"method": "p-tuning"},
    "from a text": {"method": "prompt", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "the cat"},
    "base in bf16": {"method": "lora", "dtype": "bfloat16"},
    "a stage": {"adapters": {"a": {"method": "lora", "stop_step": 2}, "b": {"method": "bottleneck"}}, "max_steps": 3},
    "a router": {"adapters": {n: {"method": "lora"} for n in "ab"}, "composition": "pooled_router(a, b)"},
}
QUICK = ("lora",)


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.full) for c in DEMO])
def test_the_demo_s_model_needs_what_was_forecast(case: str, pairs: str, tmp_path: Path) -> None:
    held_to(tmp_path / "out", model=str(BASE), data=pairs, **DEMO[case])


@pytest.mark.full
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (models.t5, {"method": "lora"}),
        (models.bart, {"method": "prefix"}),
        (models.bloom, {"method": "prompt"}),
        (models.gemma2, {"method": "lora"}),
        (models.mixtral, {"method": "lora", "target_modules": ["q_proj", "v_proj"], "dtype": "bfloat16"}),
    ],
)
def test_other_models_do(make: Callable[..., Any], settings: dict[str, Any], pairs: str, tmp_path: Path) -> None:
    held_to(tmp_path / "out", model=str(save_base(tmp_path / "base", make)), data=pairs, **settings)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["classes", "tags", "two data sets"])
def test_other_tasks_do(kind: str, pairs: str, tmp_path: Path) -> None:
    texts = ["a" * (9 + 20 * (i % 2)) for i in range(24)]
    settings: dict[str, Any] = {"method": "lora"}
    match kind:
        case "classes":
            rows = [{"text": text, "label": "xyz"[i % 3]} for i, text in enumerate(texts)]
        case "tags":
            rows = [{"tokens": list(text), "tags": ["ABC"[i % 3]] * len(text)} for i, text in enumerate(texts)]
        case _:
            rows = [{"prompt": text, "completion": "c"} for text in texts]
            sets = {"x": {"data": pairs, "composition": "a"}, "y": {"data": "", "composition": "a + b"}}
            settings = {"adapters": {"a": {"method": "lora"}, "b": {"method": "bottleneck"}}, "datasets": sets}
    file = written(tmp_path / "rows.jsonl", rows)
    if kind == "two data sets":
        settings["datasets"]["y"]["data"] = file
    else:
        settings["data"] = file
    make = models.llama if kind == "two data sets" else models.bert
    held_to(tmp_path / "out", model=str(save_base(tmp_path / "base", make)), **settings)


# ---- a Llama of 100 million parameters -------------------------------------------------------------------------------


def llama(folder: Path, **sizes: Any) -> str:
    """A folder with the configuration alone: no weights, no tokenizer."""
    usual = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    LlamaConfig(**{"vocab_size": 10000, "tie_word_embeddings": False, **usual, **sizes}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def large(tmp_path: Path) -> str:
    return llama(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Two of its layers, half as wide."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 6}
    return llama(tmp_path, **sizes)


@pytest.mark.parametrize(
    ("rows", "more"),
    [
        (2, {}),
        pytest.param(4, {"bf16": True}, marks=pytest.mark.full),
        pytest.param(4, {"gradient_checkpointing": True}, marks=pytest.mark.full),
        pytest.param(1, {"method": "full-copy"}, marks=pytest.mark.full),
    ],
)
def test_a_large_llama_needs_what_was_forecast(large: str, rows: int, more: dict[str, Any]) -> None:
    settings = {"method": "prompt + lora", **more}
    batch = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows, "max_length": 32}
    found = estimate(model=large, use_cpu=True, calibrate=True, **batch, **settings)
    assert found.parameters - found.trainable == 100_313_856
    assert found.base == pytest.approx(4 * 100_313_856, rel=1e-3)
    assert found.measured is not None
    rss = size(found.measured.rss)
    print(f"forecast {size(found.step.peak)}, live {size(found.measured.peak)}, RSS {rss}, {found.seconds:.2f} s")
    assert found.step.peak == pytest.approx(found.measured.peak, rel=CLOSE)
    assert found.measured.rss > found.measured.peak
    assert found.seconds == found.measured.seconds > 0


def test_nothing_is_loaded(tmp_path: Path) -> None:
    wide = llama(tmp_path, vocab_size=200_000, num_hidden_layers=1)
    before, state, drawn = psutil.Process().memory_info().rss, torch.get_rng_state(), random.getstate()
    found = estimate(model=wide, use_cpu=True, max_length=512, method="lora")
    assert found.base > 2**30
    assert psutil.Process().memory_info().rss - before < 2**28
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


# ---- its figures, one by one -----------------------------------------------------------------------------------------


def test_parts_are_what_arithmetic_says(small: str) -> None:
    asked = {"model": small, "use_cpu": True, "max_length": 64, "per_device_train_batch_size": 4}
    found = estimate(method="lora", r=4, **asked)
    trained = 2 * 4 * (4 * (384 + 384) + 3 * (384 + 1024))
    frozen = 2 * (4 * 384 * 384 + 3 * 384 * 1024 + 2 * 384) + 384 + 2 * 10000 * 384
    assert (found.trainable, found.parameters) == (trained, trained + frozen)
    assert (found.step.gradients, found.step.weights - found.base) == (4 * trained, 4 * trained)
    assert 8 * trained <= found.step.optimizer < 8.01 * trained, "two moments"
    # 2 for a product, in the forward and in the gradient of its input, which the first q, k and v need not give; the
    # embedding is looked up
    products = 4 * 4 * 64 * (frozen - 10000 * 384) - 2 * 4 * 64 * 3 * 384 * 384
    assert products < found.operations < 1.05 * products
    assert estimate(method="lora", r=4, optim="sgd", **asked).step.optimizer == 0
    assert estimate(method="lora", r=4, dtype="bfloat16", **asked).base == pytest.approx(found.base / 2, rel=1e-3)


def test_the_loss_counts_its_logits_in_float32(small: str) -> None:
    """In bf16 a row of logits is kept as it is, and in float32: once for the loss, and once for its gradient."""
    asked = {"model": small, "use_cpu": True, "method": "lora", "dtype": "bfloat16", "max_length": 256}
    found = estimate(**asked, per_device_train_batch_size=4)
    logits = 4 * 256 * 10000
    assert found.step.activations > 4 * logits
    assert found.step.peak > found.step.weights + 2 * 4 * logits


@pytest.mark.full
def test_checkpointing_trades_memory_for_operations(small: str) -> None:
    asked = {"model": small, "use_cpu": True, "method": "lora", "max_length": 64}
    usual = estimate(**asked, per_device_train_batch_size=4)
    saved = estimate(**asked, per_device_train_batch_size=4, gradient_checkpointing=True)
    assert saved.step.activations < usual.step.activations
    assert saved.operations > usual.operations


def naive(peak: Callable[[int], int], most: int) -> int:
    """By bisection, which needs nothing but that more rows need more."""
    low, high = 0, MOST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak(middle) <= most else (low, middle - 1)
    return low


def test_the_largest_batch_is_found_in_few_tries() -> None:
    draw = random.Random(0)
    for _ in range(500):
        slopes = [draw.choice([0, draw.random(), 10 ** draw.uniform(0, 6)]) for _ in range(3)]
        lines = [(10 ** draw.uniform(0, 10), slope) for slope in slopes]
        most, tried = int(10 ** draw.uniform(0, 11)), list[int]()

        def needed(rows: int, lines: list[tuple[float, float]] = lines) -> int:
            return int(max(fixed + each * rows for fixed, each in lines))

        def peak(rows: int, tried: list[int] = tried, needed: Callable[[int], int] = needed) -> int:
            tried.append(rows)
            return needed(rows)

        assert largest_batch(peak, most, start=draw.choice([1, 8, 64])) == naive(needed, most), (lines, most)
        assert len(tried) <= 30


def test_one_row_more_does_not_fit(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(free=200 * 2**20, total=2**34)
    monkeypatch.setattr(memory, "room", lambda device: room)
    asked = {"model": small, "use_cpu": True, "method": "lora", "max_length": 64, "eval_strategy": "no"}
    found = estimate(**asked, per_device_train_batch_size=64)
    assert not found.fits
    fits = estimate(**asked, per_device_train_batch_size=found.largest_batch)
    over = estimate(**asked, per_device_train_batch_size=found.largest_batch + 1)
    assert fits.peak <= usable(room) < over.peak
    assert (fits.fits, over.fits) == (True, False)
    told = [str(cell) for table in tables(found) for column in getattr(table, "columns", ()) for cell in column.cells]
    assert "it does not fit" in told
    assert any(f"per_device_train_batch_size={found.largest_batch} or less" in cell for cell in told)
    with pytest.raises(ValueError, match=r"are free\. Give a smaller per_device_train_batch_size or max_length"):
        estimate(**asked, per_device_train_batch_size=64, calibrate=True)


def test_memory_in_a_container_is_the_container_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("1000000\n")
    (tmp_path / "now").write_text("400000\n")
    monkeypatch.setattr(memory, "LIMITS", ((tmp_path / "max", tmp_path / "now"),))
    assert memory.room(torch.device("cpu")) == Room(free=600000, total=1000000)
    (tmp_path / "max").write_text("max\n")
    assert memory.room(torch.device("cpu")).total == psutil.virtual_memory().total


# ---- what cannot be forecast -----------------------------------------------------------------------------------------


def test_what_cannot_be_forecast_is_refused(small: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer that says what it takes: give max_length"):
        estimate(model=small, method="lora")
    with pytest.raises(ValueError, match="has no effect on images"):
        estimate(model=str(save_base(tmp_path / "vit", models.vit)), method="lora", max_length=12)
    config = json.loads(Path(small, "config.json").read_text())
    Path(small, "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match="is quantised"):
        estimate(model=small, method="lora", max_length=12)
    with pytest.raises(ValueError, match="cannot be forecast, as its step cannot be run on tensors without data"):
        estimate(model=str(save_base(tmp_path / "moe", models.mixtral)), method="lora", max_length=12, use_cpu=True)


def test_an_image_classifier_is_forecast_from_its_configuration(tmp_path: Path) -> None:
    models.vit().config.save_pretrained(tmp_path)
    found = coadapt.estimate(model=str(tmp_path), method="lora", use_cpu=True)
    assert (found.task, found.length) == ("image-classification", 0)
    assert found.largest_batch > 8
