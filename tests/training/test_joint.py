"""One run over several data sets: each adapter comes out as from its solo run; what starts late, stops early, resumes."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from coadapt.training.record import read_log
from coadapt.training.run import Outcome, train
from coadapt.training.settings import RunConfig

STEPS = 50
COMMON: dict[str, Any] = {"use_cpu": True, "logging_steps": 10, "eval_split": 0.2, "verify": False, "save_strategy": "no"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two files of unequal length, with columns of different names and rows of different lengths."""
    folder = tmp_path_factory.mktemp("joint")
    add = [{"prompt": f"{a}+{b}=", "completion": f" {a + b}"} for a in range(6) for b in range(5)]
    say = [{"question": f"say {'ab'[n % 2] * (n + 1)} now", "reply": f"{'yes' if n % 2 else 'no'} {n}"} for n in range(17)]
    for name, rows in (("add", add), ("say", say)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in ("add", "say")}


def go(base: str, out: Path, console: Console | None = None, **settings: Any) -> Outcome:
    run = RunConfig(model=base, output_dir=str(out), **{**COMMON, **settings})
    return train(run, console or Console(file=io.StringIO(), width=160))


def weights(out: Path, adapter: str) -> dict[str, torch.Tensor]:
    place = out / adapter if (out / adapter).is_dir() else out
    return load_file(place / "adapter_model.safetensors")


def off(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest distance of a tensor, relative to its norm."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).norm() / other[k].norm().clamp(min=1e-12)) for k in one)


def losses(out: Path, key: str) -> list[float]:
    return [line[key] for line in read_log(out / "metrics.jsonl") if key in line]


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4, "learning_rate": 1e-2, "warmup_steps": 5, "weight_decay": 0.1},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3, "learning_rate": 2e-2, "max_grad_norm": 0.1},
    "prefix": {"method": "prefix", "num_virtual_tokens": 2, "learning_rate": 2e-2},
    "bottleneck": {"method": "bottleneck", "learning_rate": 5e-3},
    "ia3": {"method": "ia3", "learning_rate": 2e-2},
}


def sets(files: dict[str, str], **both: Any) -> dict[str, dict[str, Any]]:
    say = {"data": files["say"], "composition": "right", "prompt_column": "question", "completion_column": "reply"}
    return {"add": {"data": files["add"], "composition": "left", "weight": 5, **both}, "say": {**say, "weight": 3, **both}}


def solo(of: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {name: {key: value for key, value in of[name].items() if key != "weight"}}


@pytest.mark.parametrize("left", ["lora", "prompt"])
@pytest.mark.parametrize("right", ["lora", "prefix", "bottleneck"])
def test_each_adapter_is_what_its_solo_run_gives(
    base: str, files: dict[str, str], tmp_path: Path, left: str, right: str
) -> None:
    both, adapters = sets(files), {"left": KINDS[left], "right": KINDS[right]}
    how: dict[str, Any] = {"max_steps": STEPS, "eval_steps": 25}
    go(base, tmp_path / "joint", datasets=both, adapters=adapters, per_device_train_batch_size=8, **how)
    for name, adapter, rows in (("add", "left", 5), ("say", "right", 3)):
        alone = {"datasets": solo(both, name), "adapters": {adapter: adapters[adapter]}}
        go(base, tmp_path / name, **alone, per_device_train_batch_size=rows, **how)
        assert off(weights(tmp_path / "joint", adapter), weights(tmp_path / name, adapter)) < 1e-4
        assert losses(tmp_path / "joint", f"eval/{name}/loss") == pytest.approx(losses(tmp_path / name, "eval/loss"), rel=1e-4)
        assert losses(tmp_path / "joint", f"train/loss/{name}") == pytest.approx(losses(tmp_path / name, "train/loss"), rel=1e-4)
