"""A training run from its settings to the finished folder."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from coadapt.core.base import fingerprint
from coadapt.data.collate import Collator
from coadapt.data.columns import Told
from coadapt.data.images import ImageCollator, prepare_images
from coadapt.data.prepare import CLASSIFYING, Plan, Prepared, has_tags, plan, prepare
from coadapt.data.show import describe, one_image, one_sample
from coadapt.data.source import read
from coadapt.data.tokens import IGNORED
from coadapt.formats.files import aside, saving
from coadapt.model import PeftModel
from coadapt.training import folder, processes
from coadapt.training.assemble import (
    Processor,
    adapter_config,
    attach,
    check_sight,
    check_vocabulary,
    load_base,
    load_config,
    load_processor,
    longest,
    pad_token,
    rates,
    seed_everything,
    task_of_model,
)
from coadapt.training.memory import Forecast, size
from coadapt.training.memory import total as device_memory
from coadapt.training.monitor import Stillness, teller
from coadapt.training.panel import screen
from coadapt.training.picture import draw
from coadapt.training.recommend import parameters
from coadapt.training.record import EarlyStop, Interrupt, MetricsLog, Watch, check_tracker, read_log
from coadapt.training.settings import RunConfig, Task
from coadapt.training.trainer import AdapterTrainer


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    folder: Path
    step: int
    interrupted: bool
    held_out_loss: float | None
    """Of the adapters that were saved."""
    best_step: int | None
    """The step that they are of, where the best ones are kept; None where they are those of the last step."""
    view: PeftModel
    processor: Processor


def prove(view: PeftModel, batch: Mapping[str, Any], console: Console) -> None:
    """Tries one step, and says what it found.

    Raises:
        ValueError: an adapter would not train, or something frozen would.
    """
    report = view.verify(batch, merge=False)
    if in_vain := [str(f) for f in report.failed if f.grave]:
        raise ValueError(
            "\n".join(["One step was tried, and training would be in vain (verify=false goes on):", *in_vain])
        )
    for finding in report.failed:
        console.print(Text(str(finding), "yellow"))
    told = "one step was tried: every adapter changes the output, gets a gradient and moves; nothing else does"
    console.print(Text(told if report else "one step was tried; the rest of it is well", "dim"), "")


def train(run: RunConfig, console: Console) -> Outcome:
    """Reads the data, attaches the adapters, trains, and writes the folder; says on `console` what it does.

    Raises:
        ValueError: anything in the settings, the data or the model that does not fit, before a step is run.
        FileNotFoundError: the data or the model is not there.
    """
    check_tracker(run.report_to)
    writes = processes.first()  # of several processes the others compute along, and leave no trace
    console = console if writes else Console(quiet=True)
    out = folder.output_dir(run)
    start = folder.claim(out, run)
    checkpoint = start.checkpoint
    task, found, made, processor = _data(run)
    if run.early_stopping_patience is not None and made.held_out is None:
        raise ValueError(
            f"early_stopping_patience={run.early_stopping_patience} watches the held-out loss, and nothing is held "
            f"out: eval_split={run.eval_split:g} of {made.tally.rows} rows. Give eval_data, or a larger eval_split."
        )
    console.print(describe(found, made))
    if isinstance(processor, PreTrainedTokenizerBase):
        console.print(Text("\none example, trained tokens between ⟦ and ⟧:", "dim"))
        console.print(one_sample(made.train[0], processor, found.classes), "")
    else:
        console.print(Text("\none example, its class between ⟦ and ⟧:", "dim"))
        console.print(one_image(made.train[0], found.classes), "")
    seed_everything(run.seed)
    configs = {name: adapter_config(name, a, task, run.revision) for name, a in run.adapters.items()}
    base = load_base(run.model, task, processor, dtype=run.dtype, revision=run.revision, classes=found.classes)
    check_vocabulary(base, made.train, processor)
    run = run.with_rates(parameters(base))
    run = run.model_copy(update={"task": task, "output_dir": str(out), "max_length": made.max_length})
    if checkpoint is not None:
        folder.same_run(out, run)  # now with what was open
    view = attach(base, configs, run.composition, new_head=task == "image-classification")
    trainer = _trainer(run, view, made, processor, out, resuming=checkpoint is not None)
    console.print(settings_table(run, view, trainer.forecast()), "")
    if run.resume:
        console.print(Text(_resumed(start)), soft_wrap=True)
    if run.verify and checkpoint is None:
        prove(view, trainer.data_collator([made.train[i] for i in range(min(len(made.train), 2))]), console)
    if writes:
        _begin(run, out, start)
    log = out / folder.METRICS
    trainer.monitor.tell = teller(console, log)
    stillness = Stillness(view, trainer.monitor.tell)
    with Interrupt() as interrupt:
        shown = screen(console, stillness, interrupt)
        if run.early_stopping_patience is not None:
            trainer.add_callback(EarlyStop(run.early_stopping_patience, run.early_stopping_threshold))
        for callback in (Watch(), *((MetricsLog(log), stillness, shown) if writes else ()), interrupt):
            trainer.add_callback(callback)
        try:
            if checkpoint is not None and start.ended:
                trainer.take_up(checkpoint)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            shown.stop()
    done = _finish(run, trainer, view, processor, found, made, out, interrupt.asked)
    if done.best_step is not None:
        console.print(Text(f"\n{_stopped(run, done, trainer.state.max_steps)}"), soft_wrap=True)
    return done


def _begin(run: RunConfig, out: Path, start: folder.Start) -> None:
    """The folder as the run begins with it."""
    if start.checkpoint is None:
        folder.clear(out)
    for path in start.broken:
        shutil.rmtree(path, ignore_errors=True)
    folder.write_run(out, run)


def _data(run: RunConfig) -> tuple[Task, Plan, Prepared, Processor]:
    told = Told(
        text=run.text_column,
        prompt=run.prompt_column,
        completion=run.completion_column,
        label=run.label_column,
        image=run.image_column,
    )
    source = read(run.data, run.dataset_config)
    held_out = read(run.eval_data, run.dataset_config) if run.eval_data else None
    config = load_config(run.model, run.revision)
    task = run.task or task_of_model(config)
    if run.task is None and task == "sequence-classification" and has_tags(source):
        task = "token-classification"  # an encoder can be either
    found = plan(source, held_out, told, task)
    decided: dict[str, Task] = {
        "labelled": "sequence-classification",
        "tagged": "token-classification",
        "pictured": "image-classification",
    }
    task = task or decided.get(found.form.kind, "causal-lm")
    check_sight(run.model, config, task)
    processor = load_processor(run.model, task, run.revision)
    if not isinstance(processor, PreTrainedTokenizerBase):
        if run.max_length is not None:
            raise ValueError(f"max_length={run.max_length} has no effect on images. Leave it out.")
        return task, found, prepare_images(found, eval_split=run.eval_split, seed=run.seed), processor
    made = prepare(
        found,
        processor,
        task=task,
        max_length=longest(run, config, processor),
        eval_split=run.eval_split,
        seed=run.seed,
        completion_only_loss=run.completion_only_loss,
        separator=run.prompt_separator,
    )
    return task, found, made, processor


def _trainer(
    run: RunConfig, view: PeftModel, made: Prepared, processor: Processor, out: Path, resuming: bool
) -> AdapterTrainer:
    classes = run.task in CLASSIFYING
    trainer = AdapterTrainer(
        model=view,
        rates=rates(run, view),
        args=training_arguments(run, out, evaluates=made.held_out is not None, resuming=resuming),
        train_dataset=made.train,
        eval_dataset=made.held_out,
        data_collator=(
            Collator(pad_token_id=pad_token(processor))
            if isinstance(processor, PreTrainedTokenizerBase)
            else ImageCollator(processor=processor)
        ),
        compute_metrics=_accuracy if classes else None,
        preprocess_logits_for_metrics=_chosen if classes else None,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def training_arguments(run: RunConfig, out: Path, evaluates: bool, resuming: bool = False) -> TrainingArguments:
    """transformers' own arguments: the fields of the same name, and what follows from the others."""
    known = TrainingArguments.__dataclass_fields__
    same = {
        name: value for name, value in run if name in known and name not in ("output_dir", "gradient_checkpointing")
    }
    # Its name since transformers 5.20; the older one warns there.
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    return TrainingArguments(
        **{
            **same,
            checkpointing: run.gradient_checkpointing,
            "output_dir": str(out),
            "learning_rate": max(run.peak_rates().values()),
            "max_grad_norm": 0.0,
            "eval_strategy": run.eval_strategy if evaluates else "no",
            "eval_on_start": run.eval_on_start and evaluates and not resuming,
            "load_best_model_at_end": run.early_stopping_patience is not None,
            "metric_for_best_model": "eval_loss" if evaluates and run.eval_strategy != "no" else None,
            "greater_is_better": False,
            "include_num_input_tokens_seen": "no" if run.task == "image-classification" else "non_padding",
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "prediction_loss_only": run.task not in CLASSIFYING,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available() and not run.use_cpu,
        }
    )


def _chosen(logits: Any, labels: Tensor) -> Tensor:
    scores = logits[0] if isinstance(logits, tuple | list) else logits
    return scores.argmax(-1)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    labels = np.asarray(prediction.label_ids)
    return {"accuracy": float(np.mean(np.equal(prediction.predictions, labels)[labels != IGNORED]))}


def settings_table(run: RunConfig, view: PeftModel, needed: Forecast) -> Table:
    """Every setting of the run, those that were left at their default dimmed, what trains, and what memory it needs."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    plain = run.plain()
    for name, adapter in plain.pop("adapters").items():
        table.add_row(f"adapters.{name}", Text(", ".join(f"{k}={v}" for k, v in adapter.items())))
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    chosen = {k: v for k, v in plain.items() if v is not None and v != defaults[k]}
    for name, value in chosen.items():
        table.add_row(name, Text(str(value)))
    rest = ", ".join(f"{k}={v!r}" for k, v in plain.items() if k not in chosen and v is not None)
    table.add_row(Text("defaults", "dim"), Text(rest, "dim"))
    trained, total = view.get_nb_trainable_parameters()
    table.add_row("trainable", f"{trained:,} of {total:,} parameters ({trained / total:.2%})")
    table.add_row("memory", Text(f"{needed}; the device has {size(device_memory())}"))
    return table


def _finish(
    run: RunConfig,
    trainer: AdapterTrainer,
    view: PeftModel,
    processor: Processor,
    found: Plan,
    made: Prepared,
    out: Path,
    interrupted: bool,
) -> Outcome:
    state = trainer.state
    log = read_log(out / folder.METRICS)
    held_out = [line["eval/loss"] for line in log if "eval/loss" in line]
    best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
    best_step = state.best_global_step if best and run.early_stopping_patience is not None and not interrupted else None
    if processes.first():
        folder.link(out, "last", out / f"checkpoint-{state.global_step}")
        folder.link(out, "best", best)
    if not interrupted and processes.first():
        with saving(out) as new:
            processor.save_pretrained(new.folder)
        with aside(out / folder.PICTURE) as file:
            draw(log, file, title(run))
        figures = _figures(state.global_step, log, made, best_step)
        folder.write_card(out, run, figures, made.framing and made.framing.style, found.classes)
        facts = {
            "data": {"name": run.data, "sha256": made.fingerprint, "format": found.form.name, "classes": found.classes}
        }
        facts |= {"base": {"name": run.model, "fingerprint": fingerprint(view.get_base_model())}}
        if made.framing is not None:
            facts["prompt"] = {"style": made.framing.style, "separator": made.framing.separator}
        folder.write_provenance(out, **facts, figures=figures)
        view.save_pretrained(out)  # last: where an adapter is found, all that belongs to it is there
    return Outcome(
        folder=out,
        step=state.global_step,
        interrupted=interrupted,
        held_out_loss=state.best_metric if best_step is not None else held_out[-1] if held_out else None,
        best_step=best_step,
        view=view,
        processor=processor,
    )


def _resumed(start: folder.Start) -> str:
    left = [f"{path.name} is left out, it was not written to its end: {why}." for path, why in start.broken.items()]
    if start.checkpoint is None:
        return "\n".join([*left, "There is no checkpoint yet: training begins anew."])
    end = " Training had ended there; what it came to is written now." if start.ended else ""
    return "\n".join([*left, f"Going on from {start.checkpoint.name}.{end}"])


def title(run: RunConfig) -> str:
    """Base, methods and data, for the picture."""
    methods = " + ".join(a.method for a in run.adapters.values())
    return f"{Path(run.model).name} · {methods} · {Path(run.data).name}"


def _stopped(run: RunConfig, done: Outcome, steps: int) -> str:
    early = (
        f"Stopped early, at step {done.step} of {steps}: no better held-out loss in "
        f"{run.early_stopping_patience} evaluations."
        if done.step < steps
        else f"Trained to the end, step {done.step}."
    )
    return f"{early} Saved are the best adapters, of step {done.best_step} (held-out loss {done.held_out_loss:.4f})."


def _figures(step: int, log: list[dict[str, Any]], made: Prepared, best: int | None) -> Mapping[str, Any]:
    held_out = {line["step"]: line["eval/loss"] for line in log if "eval/loss" in line}
    train = [line["train/loss"] for line in log if "train/loss" in line]
    figures: dict[str, Any] = {
        "steps": step,
        "training rows": made.tally.rows,
    }
    figures |= {"tokens of training data": made.tally.tokens} if made.tally.tokens else {}
    figures |= {"last training loss": round(train[-1], 4)} if train else {}
    figures |= {} if best is None else {"saved": f"the best adapters, of step {best}"}
    if not held_out:
        return figures
    first, last = next(iter(held_out.values())), list(held_out.values())[-1]
    saved = last if best is None else held_out[best]
    return figures | {"held-out loss": f"{first:.4f} → {saved:.4f}"}
