"""The folder of a run: what must not be lost in it, and what stands beside the adapter."""

import json
import platform
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from coadapt.formats.files import (
    CHECKPOINT,
    COMPOSITION,
    CONFIG,
    GATES,
    PROVENANCE,
    TRAINING,
    WEIGHTS,
    aside,
    read_json,
    settle,
)
from coadapt.formats.package import CARD, PICTURE
from coadapt.formats.provenance import versions
from coadapt.training import sharing
from coadapt.training.log import EVALUATION, METRICS, RUN, read_log
from coadapt.training.settings import RunConfig, Task
from coadapt.training.sharing import ACCUMULATION, BATCH, STATE, Share

MAY_CHANGE = frozenset(
    """max_steps num_train_epochs logging_steps eval_strategy eval_steps eval_on_start save_strategy save_steps
    save_total_limit report_to use_cpu fsdp device_map max_memory verify
    dataloader_num_workers per_device_eval_batch_size output_dir
    auto_find_batch_size early_stopping_patience early_stopping_threshold""".split()
)
"""Settings that a resumed run may have otherwise than the run that it goes on with."""


AUTO_NAMES: Mapping[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}


def output_dir(run: RunConfig) -> Path:
    """Where the run writes."""
    if run.output_dir is not None:
        return Path(run.output_dir).expanduser()
    methods = "+".join(dict.fromkeys(a.method for a in run.adapters.values()))
    return Path("outputs", f"{Path(run.model).name}-{methods}")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None = None
    """What it goes on from; None: it begins anew."""
    run: RunConfig | None = None
    """The run with the batches that keep the rows of a step what they were; None: it begins anew."""
    then: Share | None = None
    """How the run that it goes on with shared the rows of a step."""
    ended: bool = False
    """Whether training ended with this checkpoint, and only the results are to be written."""
    broken: Mapping[Path, str] = field(default_factory=dict[Path, str])
    """Later checkpoints that are not whole, with what is wrong. They are in the way, and of no use."""


def claim(folder: Path, run: RunConfig) -> Start:
    """Whether the run may write there, before anything is done; what to go on from, if the run resumes.

    A run that ended before its first checkpoint begins anew.

    Raises:
        ValueError: it holds results that the run was not told to replace or to go on with, or nothing to go on with, or
            the checkpoint is of a run with other settings, or its settings or its log are damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={str(folder)!r} is a file.")
    if run.resume:
        return _resume(folder, run)
    results = [p.name for p in _results(folder)]
    if results and not run.overwrite_output_dir:
        raise ValueError(
            f"output_dir={str(folder)!r} holds the results of a run already ({', '.join(sorted(results)[:4])}). Go on "
            "with it (--resume), replace it (--overwrite-output-dir), or choose another folder (--output-dir)."
        )
    return Start()


def _resume(folder: Path, run: RunConfig) -> Start:
    checkpoints = _checkpoints(folder)
    if not (folder / RUN).is_file():
        raise ValueError(
            f"resume: {folder} holds checkpoints, and no {RUN} that says how they came about. Put it back, or begin "
            "anew (--overwrite-output-dir)."
            if checkpoints
            else f"resume: {folder} holds no checkpoint to go on from, nor a {RUN}. Leave resume out to begin."
        )
    before = same_run(folder, run)
    read_log(folder / METRICS)
    broken: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints):
        if (wrong := damage(checkpoint)) is None:
            then = sharing.found(checkpoint, before)
            run = sharing.taken_up(run, before, then)
            ended = _ended(folder, checkpoint, before, run)
            return Start(checkpoint=checkpoint, run=run, then=then, broken=broken, ended=ended)
        broken[checkpoint] = wrong
    # A process that is killed leaves one such checkpoint; several have another cause, and somebody may mend them.
    found = "; ".join(f"{path.name}: {wrong}" for path, wrong in broken.items())
    if len(broken) > 1:
        raise ValueError(
            f"resume: no checkpoint in {folder} is whole ({found}). Mend one, or begin anew (--overwrite-output-dir)."
        )
    if any(path.name not in (RUN, METRICS) and path not in broken for path in _results(folder)):
        raise ValueError(
            f"resume: {folder} holds what a run came to, and no checkpoint to go on from{found and f' ({found})'}. "
            "To train it anew: --overwrite-output-dir."
        )
    return Start(broken=broken)


def _ended(folder: Path, checkpoint: Path, before: Mapping[str, Any], run: RunConfig) -> bool:
    """Trainer itself would make one step more, or refuse where it stopped early."""
    state = read_json(checkpoint / STATE)
    same = all(before[name] == getattr(run, name) for name in ("max_steps", "num_train_epochs"))
    steps = state["max_steps"] if same else run.max_steps
    if 0 < steps <= state["global_step"]:
        return True
    callbacks = state.get("stateful_callbacks", {})
    if callbacks.get("Course", {}).get("attributes", {}).get("ended"):
        return True
    stopping = callbacks.get("EarlyStop", {}).get("attributes", {})
    enough = run.early_stopping_patience is not None and (
        stopping.get("early_stopping_patience_counter", 0) >= run.early_stopping_patience
    )
    return enough and not any((folder / name).is_file() for name in (CONFIG, COMPOSITION))


def _checkpoints(folder: Path) -> list[Path]:
    """Those that Trainer has written, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def damage(checkpoint: Path) -> str | None:
    """What keeps a run from going on from a checkpoint; None where it is whole."""
    for name in (CHECKPOINT, "optimizer.pt", "scheduler.pt", "rng_state*.pth", STATE):
        files = list(checkpoint.glob(name))
        if not files:
            return f"{name.replace('*', '')} is missing"
        if cut := [file.name for file in files if not _whole(file)]:
            return f"{cut[0]} was cut off"
    share = sharing.recorded(checkpoint)
    left = 0 if share is None or share.processes == 1 else share.processes
    lost = [name for rank in range(left) if not (checkpoint / (name := f"rng_state_{rank}.pth")).is_file()]
    return f"{lost[0]} is missing" if lost else None


def _whole(file: Path) -> bool:
    if file.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(file)
    try:
        if file.name == STATE:
            return "global_step" in read_json(file)
        with safe_open(str(file), "pt") as tensors:
            return len(tensors.keys()) > 0
    except (ValueError, SafetensorError):
        return False


def clear(folder: Path) -> None:
    """Takes the results of an earlier run away, and nothing else that is there; its settings first.

    Without them, what is left of it when this is cut off is not taken for part of the next run.
    """
    settle(folder)
    for path in _results(folder):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _results(folder: Path) -> list[Path]:
    """What a run writes, as far as it is there; anything else in the folder is the user's."""
    parts = [p.parent for p in folder.glob(f"*/{CONFIG}") if not p.parent.is_symlink()]
    checkpoints = _checkpoints(folder)
    ours = [folder / name for name in (RUN, METRICS, CONFIG, COMPOSITION)]
    if not parts and not checkpoints and not any(path.exists() for path in ours):
        return []
    beside = [folder / n for n in (PROVENANCE, PICTURE, CARD, EVALUATION, WEIGHTS, TRAINING, GATES, "best", "last")]
    return [path for path in (*ours, *beside, *checkpoints, *parts) if path.exists() or path.is_symlink()]


def same_run(folder: Path, run: RunConfig) -> Mapping[str, Any]:
    """The settings of the run that is resumed.

    Raises:
        ValueError: they are damaged, or others than those of `run`; what that leaves open is not compared.
    """
    file, now = folder / RUN, run.plain()
    try:
        before = yaml.safe_load(file.read_text("utf-8"))
        lost = [name for name in now if name not in before]
        # Settings that there were not yet when it was written.
        left_open = {name: RunConfig.model_fields[name].get_default(call_default_factory=True) for name in lost}
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(
            f"resume: {file} is damaged: {error}. Mend it, or begin anew (--overwrite-output-dir)."
        ) from error
    if list(now)[-1] in lost:  # cut off
        raise ValueError(
            f"resume: {file} is incomplete: it does not say {', '.join(lost)}. Add what was set then, or begin anew "
            "(--overwrite-output-dir)."
        )
    known = {**left_open, **before}
    # What is left open now is found as it was found then.
    for name, adapter in now["adapters"].items():
        then = known["adapters"].get(name, {})
        adapter |= {key: then[key] for key in ("learning_rate", "total_step") if key not in adapter and key in then}
    free = MAY_CHANGE if len(run.sources) > 1 else MAY_CHANGE | {BATCH, ACCUMULATION}  # which `sharing` compares
    other = [n for n in now if n not in free and now[n] is not None and known[n] != now[n]]
    if other:
        shown = "\n".join(f"  {n}: {known[n]!r} then, {now[n]!r} now" for n in other)
        raise ValueError(
            f"resume: the checkpoint is of a run with other settings, which would have no effect now:\n{shown}"
        )
    return known


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


def link(folder: Path, name: str, target: Path | None) -> None:
    """`folder/name` points to one of the checkpoints in it; where links are not to be had, there is none."""
    place = folder / name
    place.unlink(missing_ok=True)
    if target is not None and target.is_dir():
        try:
            place.symlink_to(target.name, target_is_directory=True)
        except OSError:
            return
