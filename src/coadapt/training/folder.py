"""The folder of a run: what must not be lost in it, and what stands beside the adapter."""

import json
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from coadapt.formats.files import COMPOSITION, CONFIG, GATES, PROVENANCE, TRAINING, WEIGHTS, aside, read_json, settle
from coadapt.formats.provenance import versions
from coadapt.training.settings import RunConfig, Task

RUN, METRICS, PICTURE, CARD = "run.yaml", "metrics.jsonl", "loss.png", "README.md"
MAY_CHANGE = frozenset(
    """max_steps num_train_epochs logging_steps eval_strategy eval_steps eval_on_start save_strategy save_steps
    save_total_limit report_to use_cpu dataloader_num_workers per_device_eval_batch_size output_dir
    auto_find_batch_size early_stopping_patience early_stopping_threshold""".split()
)
"""Settings that a resumed run may have otherwise than the run that it goes on with."""


AUTO_NAMES: Mapping[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def output_dir(run: RunConfig) -> Path:
    """Where the run writes."""
    if run.output_dir is not None:
        return Path(run.output_dir).expanduser()
    methods = "+".join(dict.fromkeys(a.method for a in run.adapters.values()))
    return Path("outputs", f"{Path(run.model).name}-{methods}")


def claim(folder: Path, run: RunConfig) -> Path | None:
    """Whether the run may write there, before anything is done; the checkpoint to go on from, if the run resumes.

    Raises:
        ValueError: it holds results that the run was not told to replace or to go on with, or nothing to go on with, or
            the checkpoint is of a run with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is a file.")
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    if run.resume:
        if not checkpoints:
            raise ValueError(f"resume: {folder} holds no checkpoint to go on from. Leave resume out to begin.")
        same_run(folder, run)
        return checkpoints[-1]
    results = [p.name for p in _results(folder)]
    if results and not run.overwrite_output_dir:
        raise ValueError(
            f"output_dir={str(folder)!r} holds the results of a run already ({', '.join(sorted(results)[:4])}). Go on "
            "with it (--resume), replace it (--overwrite-output-dir), or choose another folder (--output-dir)."
        )
    return None


def clear(folder: Path) -> None:
    """Takes the results of an earlier run away, and nothing else that is there."""
    settle(folder)
    for path in _results(folder):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _results(folder: Path) -> list[Path]:
    """What a run writes, as far as it is there; anything else in the folder is the user's."""
    parts = [p.parent for p in folder.glob(f"*/{CONFIG}") if not p.parent.is_symlink()]
    checkpoints = list(folder.glob("checkpoint-*"))
    ours = [folder / name for name in (RUN, METRICS, CONFIG, COMPOSITION)]
    if not parts and not checkpoints and not any(path.exists() for path in ours):
        return []
    beside = [folder / n for n in (PROVENANCE, PICTURE, CARD, WEIGHTS, TRAINING, GATES, "best", "last")]
    return [path for path in (*ours, *beside, *checkpoints, *parts) if path.exists() or path.is_symlink()]


def same_run(folder: Path, run: RunConfig) -> None:
    """Raises a ValueError if the run in `folder` had other settings. What `run` leaves open is not compared."""
    file = folder / RUN
    before = yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}
    now = run.plain()
    for name, adapter in now["adapters"].items():
        if "learning_rate" not in adapter and (then := before.get("adapters", {}).get(name)):
            adapter["learning_rate"] = then["learning_rate"]
    other = [n for n in now if n not in MAY_CHANGE and now[n] is not None and n in before and before[n] != now[n]]
    if other:
        shown = "\n".join(f"  {n}: {before[n]!r} then, {now[n]!r} now" for n in other)
        raise ValueError(
            f"resume: the checkpoint is of a run with other settings, which would have no effect now:\n{shown}"
        )


def write_run(folder: Path, run: RunConfig) -> None:
    """Saves the whole configuration, defaults and all."""
    with aside(folder / RUN) as file:
        text = yaml.safe_dump(run.plain(), sort_keys=False, allow_unicode=True)
        file.write_text(f"# coadapt train --config {RUN}\n{text}", "utf-8")


def write_provenance(folder: Path, **facts: Any) -> None:
    """Adds to what stands beside the adapter already: versions, hardware, and `facts`."""
    file = folder / PROVENANCE
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    hardware = {"machine": platform.machine(), "system": sys.platform, "threads": torch.get_num_threads(), "gpus": gpus}
    known = {"versions": versions("accelerate", "datasets", "tokenizers"), "hardware": hardware}
    before = read_json(file) if file.is_file() else {}
    with aside(file) as part:
        part.write_text(json.dumps({**before, **known, **facts}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_card(folder: Path, run: RunConfig, figures: Mapping[str, Any], prompt_style: str) -> None:
    """The model card, which hubs show."""
    peak = run.peak_rates()
    adapters = "\n".join(
        f"| `{name}` | {a.method} | {peak[name]:g} | " + ", ".join(f"{k}={v}" for k, v in a.options.items()) + " |"
        for name, a in run.adapters.items()
    )
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    with aside(folder / CARD) as file:
        text = _CARD.format(
            run=run,
            adapters=adapters,
            rows=rows,
            style=prompt_style,
            base=json.dumps(run.model),
            auto=AUTO_NAMES[run.task or "causal-lm"],
        )
        file.write_text(text, "utf-8")


_CARD = """---
base_model: {base}
library_name: coadapt
tags: [adapter]
---

# An adapter for {run.model}

Trained by coadapt on `{run.data}`.

| adapter | method | learning rate | options |
|---|---|---|---|
{adapters}

| | |
|---|---|
{rows}

![loss](loss.png)

```python
from coadapt import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

Prompts were put to the model in the style `{style}`. The whole configuration is in `run.yaml`, each step's figures in
`metrics.jsonl`, versions and hashes in `provenance.json`.
"""


def link(folder: Path, name: str, target: Path | None) -> None:
    """`folder/name` points to one of the checkpoints in it; where links are not to be had, there is none."""
    place = folder / name
    place.unlink(missing_ok=True)
    if target is not None and target.is_dir():
        try:
            place.symlink_to(target.name, target_is_directory=True)
        except OSError:
            return
