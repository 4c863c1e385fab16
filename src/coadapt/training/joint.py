"""Trainer for one run over one or several data sets, each with the adapters that its rows train."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from coadapt.core.method import InputMethod
from coadapt.data.by_task import TASK
from coadapt.data.tokens import IGNORED
from coadapt.evaluation.losses import row_losses, trained
from coadapt.training.course import Course
from coadapt.training.losses import Window, window
from coadapt.training.mixing import Batches, Mixture, Stream, shares, streams
from coadapt.training.settings import Task
from coadapt.training.sharing import Recorder, Share
from coadapt.training.trainer import AdapterTrainer

DATASET = "dataset"
"""Key of a batch of several data sets: (B,) the number of each row's."""


class JointTrainer(AdapterTrainer):
    """The rows of a batch go through one forward, each with its composition; of one data set, all with the view's.

    Everything else (accumulation, checkpoints, resuming, callbacks) is transformers' own.

    Args:
        weights: of each data set's rows in a batch.
        course: which adapter trains when.
        train_dataset: a `Mixture`.
        eval_dataset: the held-out rows; of several data sets a dict by name.
    """

    def __init__(self, *, weights: Sequence[float], course: Course, task: Task, **options: Any) -> None:
        self.several = len(weights) > 1
        if self.several:
            options["compute_loss_func"] = self._joint_loss
        super().__init__(**options)
        self.weights, self.course = tuple(weights), course
        self.task: Task = task
        self.add_callback(course)
        self.add_callback(Recorder(self.share))
        parts = [part for name in self.view.peft_config for part in self.view.get_adapter(name).parts]
        self._own_labels = own = [
            p.method for p in parts if isinstance(p.method, InputMethod) and p.method.labels is not None
        ]
        if self.several and own:
            raise ValueError(
                f"{type(own[0]).__name__} learns from its own tokens in a loss that is made of all rows of a batch; a "
                "run over several data sets has one for each. Train it in a run of its own."
            )
        self._trains: list[str] = []
        self._window: Window | None = None
        self._rows = torch.empty(0, dtype=torch.long)
        self._means = torch.zeros(0)
        self._evaluated = 0
        self._by_task = {d for d, rows in enumerate(self.mixture.sets.values()) if TASK in next(iter(rows), {})}
        """The data sets whose rows say their task."""
        self._sums, self._steps = torch.zeros(len(weights)), [0] * len(weights)
        """Since the last line of the log: the means of each data set, added up, and the steps that it was drawn in."""

    @property
    def mixture(self) -> Mixture:
        """What it trains on."""
        return cast(Mixture, self.train_dataset)

    # ---- batches -----------------------------------------------------------------------------------------------------

    def streams(self, batch: int) -> list[Stream]:
        """The rows of each data set in batches of so many rows in all."""
        rows, spans = [len(rows) for rows in self.mixture.sets.values()], list(self.course.plan.datasets.values())
        accumulation = self.args.gradient_accumulation_steps * self.args.world_size  # batches of a step, of all
        return streams(rows, shares(batch, self.weights), accumulation, self.args.seed, spans)

    def share(self) -> Share:
        """How the rows of a step are shared out."""
        accumulation, processes = self.args.gradient_accumulation_steps, self.args.world_size
        return Share(batch=self._train_batch_size, accumulation=accumulation, processes=processes)

    def told(self) -> dict[str, str]:
        """Of each of several data sets, what it has in a batch."""
        made = self.streams(self._train_batch_size) if self.several else []
        return {
            name: f"{stream.batch} of the {self._train_batch_size} rows of a batch, a pass in {stream.steps} steps"
            for name, stream in zip(self.mixture.sets, made, strict=False)
        }

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Elsewhere a batch without labels has no loss; accelerate gives the last processes the pass's first rows.
        counts = self.task == "causal-lm" and self.model_accepts_loss_kwargs and not self._own_labels
        among = self.args.world_size if counts else 1
        loader = DataLoader(
            self.mixture,
            batch_sampler=Batches(self.streams(self._train_batch_size), lambda: self.state.global_step, among),
            collate_fn=self._collated,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return cast(DataLoader[Any], self.accelerator.prepare(loader))

    def _collated(self, examples: Sequence[tuple[int, Any]]) -> dict[str, Tensor]:
        if not examples:  # no data set is drawn in this batch
            return {str(self.view.main_input_name): torch.zeros(0, 0), "labels": torch.zeros(0, 0)}
        rows = [row for _, row in examples]
        if any(TASK in row for row in rows):  # rows that use nothing that tells tasks apart are of any
            rows = [{TASK: 0, **row} for row in rows]
        batch: dict[str, Tensor] = dict(self.data_collator(rows))
        return {**batch, DATASET: torch.tensor([d for d, _ in examples])} if self.several else batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Trainer's own, once for each step: what trains in it is settled, and its trained tokens are counted."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        self._trains = self.course.enter(step)
        if self.several:
            drawn = self.course.drawn(step)
            batches = [kept(batch, drawn, self.task) for batch in batches]
            uses = [[a for a in self.course.plan.uses(name) if a in self._trains] for name in self.mixture.sets]
            self._window = window(self._counted(batches), uses)
            self._steps = [n + bool(count) for n, count in zip(self._steps, self._window.tokens, strict=True)]
        return batches, count

    def _counted(self, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
        """Trained tokens of each data set."""
        found = torch.zeros(len(self.weights))
        for batch in batches:
            if DATASET in batch:
                found.index_add_(0, batch[DATASET].cpu(), trained(batch["labels"], self.task).cpu())
        return found.tolist()

    # ---- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's own; what it returns, and what is logged, is the mean of the data sets' own means."""
        if not len(inputs["labels"]):
            return torch.zeros((), device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.several or self._window is None:
            return loss
        self._sums = self._sums.to(self._means.device) + self._means
        return self._means.sum() / sum(bool(count) for count in self._window.tokens)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's own, with the composition of each row; `_joint_loss` makes the loss of what the model gives."""
        if not self.several:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs, nodes = dict(inputs), list(self.course.plan.compositions.values())
        here = torch.full((len(inputs["labels"]),), self._evaluated, device=inputs["labels"].device)
        self._rows = inputs.pop(DATASET, here)
        inputs["adapter_names"] = [nodes[d] for d in self._rows.tolist()]
        if not self._by_task.intersection(self._rows.tolist()):
            inputs.pop(TASK, None)
        if self.task == "seq2seq":  # the labels stay here, and with them what the decoder reads
            base: Any = self.view.get_base_model()
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        if not model.training:
            counted = self._counted([{**inputs, DATASET: self._rows}])
            self._window = window(counted, [[name] for name in self.mixture.sets])
        return super().compute_loss(model, inputs, return_outputs)

    def _joint_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        assert self._window is not None
        loss, self._means = self._window.loss(row_losses(logits, labels, self.task), self._rows)
        return loss

    def _moving(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        groups = super()._moving(optimizer)
        return [g for g in groups if g["name"] in self._trains or g["name"] == "gates"]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        factors = {} if self._window is None else self._window.factors
        for group in [g for g in optimizer.param_groups if g["name"] in factors]:
            for parameter in [p for p in group["params"] if p.grad is not None]:
                parameter.grad.mul_(factors[group["name"]])
        super()._before_step(optimizer, args, kwargs)

    # ---- the log and the held-out rows -------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean loss of each data set since the last line."""
        if "loss" in logs and self.several and not any(self._steps):
            del logs["loss"]  # where nothing was trained: all have stopped early, and others are still to start
        if "loss" in logs:
            found = zip(self.mixture.sets, self._sums.tolist(), self._steps, strict=True)
            logs |= {f"loss/{name}": total / steps for name, total, steps in found if steps}
            self._sums, self._steps = torch.zeros_like(self._sums), [0] * len(self._steps)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Of several data sets: `eval_NAME/loss` of each, with its own composition, and `eval_loss`, their mean."""
        if not self.several or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        for name in cast(dict[str, Any], self.eval_dataset):
            self._evaluated = list(self.mixture.sets).index(name)
            only_loss = True if self.compute_metrics is None else None
            loader = self.get_eval_dataloader(name)
            found = self.evaluation_loop(loader, "Evaluation", only_loss, ignore_keys, metric_key_prefix).metrics or {}
            own = {k.removeprefix(f"{metric_key_prefix}_"): v for k, v in found.items()}
            metrics |= {f"{metric_key_prefix}_{name}/{k}": v for k, v in own.items() if k in ("loss", "accuracy")}
        for figure in ("loss", "accuracy"):
            if of := [value for key, value in metrics.items() if key.endswith(f"/{figure}")]:
                metrics[f"{metric_key_prefix}_{figure}"] = sum(of) / len(of)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.course.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.course.load(Path(resume_from_checkpoint))

    def take_up(self, checkpoint: Path) -> None:
        """As of an `AdapterTrainer`, with the best weights of the adapters that stop by themselves."""
        super().take_up(checkpoint)
        self.course.load(checkpoint)
        self.course.take_up(self.state)
        self.course.finish()


def kept(batch: dict[str, Tensor], drawn: Sequence[bool], task: Task) -> dict[str, Tensor]:
    """The rows of the data sets that are drawn, without columns that are padding in all of them.

    What a data set that has stopped had in the batch, and how long its rows were, then plays no part.
    """
    if DATASET not in batch or all(drawn[d] for d in batch[DATASET].tolist()):
        return batch
    rows = torch.tensor([drawn[d] for d in batch[DATASET].tolist()], device=batch[DATASET].device)
    left = {key: value[rows] for key, value in batch.items()}
    real = left.get("attention_mask")
    if real is None or not rows.any():
        return left
    wide, full = real.shape[1], int(real.any(0).nonzero().max()) + 1
    out = {k: v[:, :full] if v.dim() == 2 and v.shape[1] == wide and k != "labels" else v for k, v in left.items()}
    if (labels := left["labels"]).dim() == 2:
        there = labels.ne(IGNORED).any(0).nonzero()
        own = int(there.max()) + 1 if task == "seq2seq" and len(there) else full
        out["labels"] = labels[:, :own]
    return out
