"""A training run from its settings to the finished folder."""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from coadapt.data.prepare import CLASSIFYING
from coadapt.data.tokens import IGNORED
from coadapt.model import PeftModel
from coadapt.training import devices, folder, machine, processes, sharing
from coadapt.training.assemble import (
    adapter_config,
    attach,
    check_vocabulary,
    load_base,
    rates,
    seed_everything,
)
from coadapt.training.course import Course, Patience
from coadapt.training.datasets import init_from, starts_from
from coadapt.training.joint import JointTrainer
from coadapt.training.material import Material, gather
from coadapt.training.memory import Forecast
from coadapt.training.memory import total as device_memory
from coadapt.training.mixing import Mixture, shares, streams
from coadapt.training.monitor import Stillness, teller
from coadapt.training.panel import screen
from coadapt.training.presence import present
from coadapt.training.proof import prove
from coadapt.training.recommend import parameters
from coadapt.training.record import EarlyStop, Interrupt, MetricsLog, Watch, check_tracker
from coadapt.training.results import Outcome, finish, stopped
from coadapt.training.settings import RunConfig
from coadapt.training.sharding import refuse_quantised, shard
from coadapt.training.timetable import Timetable, timetable
from coadapt.training.trainer import own_seed
from coadapt.training.units import size


def train(run: RunConfig, console: Console, callbacks: Sequence[TrainerCallback] = ()) -> Outcome:
    """Reads the data, attaches the adapters, trains, and writes the folder; says on `console` what it does.

    `callbacks` are told of what Trainer tells its own.

    Raises:
        ValueError: anything in the settings, the data or the model that does not fit, before a step is run.
        FileNotFoundError: the data or the model is not there.
    """
    with processes.together(machine.on_cpu(run.use_cpu)):
        return _train(run, console, callbacks)


def _train(run: RunConfig, console: Console, callbacks: Sequence[TrainerCallback]) -> Outcome:
    run = devices.settle(run)
    check_tracker(run.report_to)
    if not processes.first():
        console = Console(quiet=True)  # of several processes the others compute along, and leave no trace
    table = timetable(run)
    out = folder.output_dir(run)
    start = folder.claim(out, run)
    told, run = run, start.run or run
    material = gather(run, table)
    material.tell(console)
    run, view = _attached(run, table, material, out, start)
    trainer = _trainer(run, view, table, material, out, resuming=start.checkpoint is not None)
    console.print(settings_table(run, view, trainer.forecast(), trainer.told()), "")
    if run.resume:
        console.print(Text(_resumed(run, start)), soft_wrap=True)
    if run.verify and start.checkpoint is None:
        prove(view, table, material, console)
    if processes.first():
        same = {name: getattr(told, name) for name in (sharing.BATCH, sharing.ACCUMULATION)}
        _begin(run.model_copy(update=same), out, start)
    for callback in callbacks:
        trainer.add_callback(callback)
    with present(out) if processes.first() else nullcontext():
        interrupted = _fit(run, trainer, start, console)
        done = finish(run, trainer, view, material, out, interrupted)
    for line in stopped(run, done, trainer):
        console.print(Text(line), soft_wrap=True)
    return done


def _attached(
    run: RunConfig, table: Timetable, material: Material, out: Path, start: folder.Start
) -> tuple[RunConfig, PeftModel]:
    """The run with what was open, and the base with its adapters."""
    task = material.task
    seed_everything(run.seed)
    run = run.with_steps(spans(run, table, material)).with_tasks(material.tasks(table))
    configs = {
        # With one data set by itself, starts are drawn one after another, as they always were.
        name: adapter_config(name, a, task, run.revision, own_seed(run.seed, name) if run.datasets else None)
        for name, a in run.adapters.items()
    }
    base = load_base(
        run.model,
        task,
        material.processor,
        dtype=run.dtype,
        revision=run.revision,
        classes=material.classes,
        quantisation=run.quantisation,
        device=machine.chosen(run.use_cpu),
        spread=run.spread,
    )
    if run.fsdp:
        refuse_quantised(base)
    if run.device_map:
        devices.refuse_all_on_disk(base, run)
    for part in material.parts.values():
        check_vocabulary(base, part.made.train, material.processor)
    run = run.with_rates(parameters(base))
    found = {"task": task, "output_dir": str(out)}
    run = run.model_copy(update=found if run.datasets else {**found, "max_length": material.first.made.max_length})
    if start.checkpoint is not None:
        folder.same_run(out, run)  # now with what was open
    # As text: gates and routers that are new draw their start now, after the seed.
    active = run.composition if len(material.parts) > 1 else material.first.settings.composition
    view = attach(base, configs, active, new_head=task == "image-classification", order=starts_from(run))
    return run, view


def _trainer(
    run: RunConfig, view: PeftModel, table: Timetable, material: Material, out: Path, resuming: bool
) -> JointTrainer:
    classes = run.task in CLASSIFYING
    held_out = {name: part.made.held_out for name, part in material.parts.items() if part.made.held_out is not None}
    weights = material.weights(run.mixing_temperature)
    rows = {name: part.made.train for name, part in material.parts.items()}
    trainer = JointTrainer(
        model=view,
        rates=rates(run, view),
        weights=weights,
        course=Course(view, table, patience=_patience(run), init_from=init_from(run)),
        task=material.task,
        args=training_arguments(
            run, out, material.evaluates, resuming, length(run, table, [len(r) for r in rows.values()], weights)
        ),
        train_dataset=Mixture(rows),
        eval_dataset=held_out if len(rows) > 1 and held_out else next(iter(held_out.values()), None),
        data_collator=material.collator(),
        compute_metrics=_accuracy if classes else None,
        preprocess_logits_for_metrics=_chosen if classes else None,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def _patience(run: RunConfig) -> dict[str, Patience]:
    """Of the adapters that stop by themselves."""
    found = {name: a.early_stopping_patience or run.early_stopping_patience for name, a in run.adapters.items()}
    return {
        name: Patience(evaluations=evaluations, threshold=run.early_stopping_threshold)
        for name, evaluations in found.items()
        if evaluations is not None and run.stops_by_adapter
    }


def length(run: RunConfig, table: Timetable, rows: Sequence[int], weights: Sequence[float]) -> int:
    """The steps of the run, or -1 where Trainer finds them itself: it passes over one data set, from end to end.

    Otherwise until each data set has been passed over `num_train_epochs` times, or its adapters have stopped.
    """
    if run.max_steps > 0 or (len(rows) == 1 and not table.staged):
        return run.max_steps
    found = streams(
        rows,
        shares(run.per_device_train_batch_size, weights),
        run.gradient_accumulation_steps * processes.count(),
        run.seed,
        list(table.datasets.values()),
    )
    return max(stream.end(run.num_train_epochs) for stream in found)


def spans(run: RunConfig, table: Timetable, material: Material) -> dict[str, int]:
    """Adapter -> the steps that it trains for.

    Raises:
        ValueError: a method wants to know, and the batch size, and so the length of the run, is to be found on the way.
    """
    rows = [len(part.made.train) for part in material.parts.values()]
    steps = length(run, table, rows, material.weights(run.mixing_temperature))
    if steps <= 0:  # as Trainer counts
        batches = math.ceil(rows[0] / run.per_device_train_batch_size / processes.count())
        steps = math.ceil(run.num_train_epochs * math.ceil(batches / run.gradient_accumulation_steps))
        if run.auto_find_batch_size and run.with_steps(dict.fromkeys(run.adapters, 1)) != run:
            raise ValueError(
                "auto_find_batch_size changes how many steps the run has, and a method's schedule needs to know: give "
                "max_steps, or the adapter's total_step."
            )
    return {name: (steps if span.stop is None else span.stop) - span.start for name, span in table.adapters.items()}


def _fit(run: RunConfig, trainer: JointTrainer, start: folder.Start, console: Console) -> bool:
    """Trains to the end; whether a person stopped it before."""
    log = Path(trainer.args.output_dir or ".") / folder.METRICS
    checkpoint = start.checkpoint
    trainer.monitor.tell = teller(console, log)
    stillness = Stillness(trainer.view, trainer.monitor.tell)
    with Interrupt() as interrupt:
        shown = screen(console, stillness, interrupt)
        if run.early_stopping_patience is not None and not run.stops_by_adapter:
            trainer.add_callback(EarlyStop(run.early_stopping_patience, run.early_stopping_threshold))
        for callback in (Watch(), *((MetricsLog(log), stillness, shown) if processes.first() else ()), interrupt):
            trainer.add_callback(callback)
        try:
            if checkpoint is not None and start.ended:
                trainer.take_up(checkpoint)
            else:
                if run.fsdp:
                    shard(trainer.view, trainer.args.device)
                    trainer.place_model_on_device = False
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            shown.stop()
    return interrupt.asked


def _begin(run: RunConfig, out: Path, start: folder.Start) -> None:
    """The folder as the run begins with it."""
    if start.checkpoint is None:
        folder.clear(out)
    for path in start.broken:
        shutil.rmtree(path, ignore_errors=True)
    folder.write_run(out, run)


def training_arguments(
    run: RunConfig, out: Path, evaluates: bool, resuming: bool = False, steps: int | None = None
) -> TrainingArguments:
    """transformers' own arguments: the fields of the same name, and what follows from the others.

    `steps` in place of `max_steps`.
    """
    known = TrainingArguments.__dataclass_fields__
    ours = ("output_dir", "gradient_checkpointing", "fsdp")  # which mean something else there
    same = {name: value for name, value in run if name in known and name not in ours}
    # Its name since transformers 5.20; the older one warns there.
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)
    cpu = machine.on_cpu(run.use_cpu)
    made = TrainingArguments(
        **{
            **same,
            "use_cpu": cpu,  # else accelerate takes each process for one alone, where there is no accelerator
            checkpointing: run.gradient_checkpointing,
            "output_dir": str(out),
            "learning_rate": max(run.peak_rates().values()),
            "max_grad_norm": 0.0,
            "max_steps": run.max_steps if steps is None else steps,
            "eval_strategy": run.eval_strategy if evaluates else "no",
            "eval_on_start": run.eval_on_start and evaluates and not resuming,
            "load_best_model_at_end": run.early_stopping_patience is not None and not run.stops_by_adapter,
            "metric_for_best_model": "eval_loss" if evaluates and run.eval_strategy != "no" else None,
            "greater_is_better": False,
            "include_num_input_tokens_seen": "no" if run.task == "image-classification" else "non_padding",
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "prediction_loss_only": run.task not in CLASSIFYING,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "log_level_replica": "error",  # as it is for the first process
            "dataloader_pin_memory": torch.cuda.is_available() and not cpu,
        }
    )
    if made.world_size != processes.count():
        raise RuntimeError(
            f"{processes.count()} processes were started, and transformers counts {made.world_size}: each would train "
            "by itself. Start them with torchrun or accelerate launch, on devices of one kind."
        )
    return made


def _chosen(logits: Any, labels: Tensor) -> Tensor:
    scores = logits[0] if isinstance(logits, tuple | list) else logits
    return scores.argmax(-1)


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    labels = np.asarray(prediction.label_ids)
    return {"accuracy": float(np.mean(np.equal(prediction.predictions, labels)[labels != IGNORED]))}


def settings_table(run: RunConfig, view: PeftModel, needed: Forecast, told: Mapping[str, str]) -> Table:
    """Every setting of the run, those that were left at their default dimmed, what trains, and what memory it needs."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    plain = run.plain()
    for name, adapter in plain.pop("adapters").items():
        table.add_row(f"adapters.{name}", Text(", ".join(f"{k}={v}" for k, v in adapter.items())))
    for name, settings in plain.pop("datasets").items():
        shown = ", ".join(f"{k}={v}" for k, v in settings.items())
        table.add_row(f"datasets.{name}", Text(f"{shown} ({told[name]})" if name in told else shown))
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


def _resumed(run: RunConfig, start: folder.Start) -> str:
    left = [f"{path.name} is left out, it was not written to its end: {why}." for path, why in start.broken.items()]
    if start.checkpoint is None:
        return "\n".join([*left, "There is no checkpoint yet: training begins anew."])
    end = " Training had ended there; what it came to is written now." if start.ended else ""
    now = sharing.wanted(run)
    shared = f" A step still has {now.rows} rows: {now}, after {start.then}." if start.then not in (None, now) else ""
    return "\n".join([*left, f"Going on from {start.checkpoint.name}.{end}{shared}"])
