"""Everything that a run can be told, once: command line flags, YAML and Python read the fields of `RunConfig`.

Importing this file imports no torch, so that help texts are quick.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from coadapt.naming import check_name
from coadapt.training.datasets import DatasetSettings, check_adapters, check_datasets, datasets_of
from coadapt.training.options import default_options, default_rate, method_named, methods, tasks_option
from coadapt.training.vocabulary import adapters_of, plain_value, refuse_unknown, renamed

Task = Literal["causal-lm", "seq2seq", "sequence-classification", "token-classification", "image-classification"]


class AdapterSettings(BaseModel):
    """One adapter of a run: its method, how it is trained, and the options of its method beside them."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True, defer_build=True)

    method: str
    """lora, dora, prompt_tuning (or prompt), prefix_tuning (or prefix), bottleneck, ia3 …"""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of this adapter; left out, the tested one of its method for a base of this size."""
    warmup_steps: float | None = Field(default=None, ge=0)
    """Its own warm-up, else the run's."""
    max_grad_norm: float | None = Field(default=None, ge=0)
    """Its own clipping, else the run's."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Its own weight decay, else the run's."""
    loraplus_lr_ratio: float | None = Field(default=None, gt=0)
    """How many times as fast as A a LoRA's B learns: LoRA+ (arXiv:2402.12354), whose paper has 16."""
    start_step: int | None = Field(default=None, ge=0)
    """The step at which it begins to train; until then it stands as it started. Left out: the first."""
    stop_step: int | None = Field(default=None, ge=1)
    """The step at which it has trained enough, and is frozen. Left out: the run's last."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Its own early stopping: frozen at its best held-out loss, while the others go on. With `datasets`, else the
    run's."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method's configuration class."""
        return dict(self.model_extra or {})

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            raise ValueError(f"an adapter is described by settings such as {{method: lora, r: 16}}; got {values!r}")
        values = renamed(values)
        if "method" not in values:
            raise ValueError(f"it needs a method. Known: {', '.join(methods())}")
        known = method_named(str(values["method"]))
        refuse_unknown(values, [*cls.model_fields, *known.names()], f"method {known.name}")
        values = {name: plain_value(name, value, known) for name, value in values.items()}
        return {**values, "method": known.name, **default_options(known.name, values)}


class RunConfig(BaseModel):
    """A training run. The names are those of transformers' `TrainingArguments` wherever it has one."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), defer_build=True)
    SECTIONS: ClassVar[Mapping[str, str]] = {
        "model": "Model and data",
        "method": "Adapters",
        "max_steps": "Training",
        "output_dir": "Output",
    }
    """Field that begins a section of the help -> its title."""
    NEEDS_DATA: ClassVar[bool] = True
    """Whether a run without data is refused."""

    model: str
    """The base: a folder or a hub id."""
    revision: str | None = None
    """Revision of the base on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the base is loaded in; adapters are float32. auto: as it was saved."""
    device_map: str | dict[str, str | int] | None = None
    """Spread the base over the devices of this machine, its memory and its disk: auto, balanced, balanced_low_0 or
    sequential; in YAML also a device for each of its parts (docs/devices.md)."""
    max_memory: dict[str | int, str | int] | None = None
    """With device_map, how much of each device the base may take, as in max_memory='{0: 20GiB, cpu: 60GiB}'."""
    load_in_4bit: bool = False
    """Quantise the base to 4 bits as it is loaded: QLoRA (bitsandbytes; docs/quantised.md)."""
    load_in_8bit: bool = False
    """Quantise the base to 8 bits as it is loaded."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    """Which 16 values 4 bits stand for; left out, nf4, as in QLoRA."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the scales of the blocks, too: 0.4 bits less for each weight."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type that layers of 4 bits multiply in; left out, the one that the base is loaded in."""
    task: Task | None = None
    """Left out, it is found from the model and the data."""
    data: str | None = None
    """What to train on: a jsonl, json, csv, tsv, parquet or txt file, a folder of such files, or a hub id; for images
    also a folder with a sub-folder for each class."""
    datasets: dict[str, DatasetSettings] = Field(default_factory=dict)
    """Several data sets in place of `data`, each with the adapter or the composition that its rows train
    (docs/joint_training.md)."""
    mixing_temperature: float | None = Field(default=None, gt=0)
    """T: of each batch, a data set of n rows has a share that goes as n^(1/T), temperature-scaled mixing
    (arXiv:1910.10683). 1 (left out): by its rows; the larger T, the more equal."""
    dataset_config: str | None = None
    """Configuration of a dataset of the hub."""
    eval_data: str | None = None
    """What to evaluate on; left out, the data's own held-out part or `eval_split`."""
    eval_split: float = Field(default=0.05, ge=0, lt=1)
    """Share of the rows to hold out, if the data has no held-out part; 0 holds out none."""
    text_column: str | None = None
    """Column of plain text, or of the text (the words, as a list) to classify."""
    prompt_column: str | None = None
    """Column of what the model is asked; also the source of seq2seq."""
    completion_column: str | None = None
    """Column of what it shall answer; also the target of seq2seq."""
    label_column: str | None = None
    """Column of the class, or of the words' tags."""
    image_column: str | None = None
    """Column of the images' files, relative to the file that names them."""
    task_column: str | None = None
    """Column of each row's task, a name or a number from 0, for adapters that tell tasks apart (poly, mtl_lora,
    multitask_prompt_tuning) and for `task_router(...)`; left out, `task_ids` where there is one. Without one, each of
    several `datasets` that train such an adapter is a task."""
    prompt_separator: str = "\n"
    """Joins a plain prompt and its completion where neither has white space there."""
    completion_only_loss: bool = True
    """Train on completions and answers only, not on what was asked."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest example in tokens; left out, 1024 or what the model and its virtual tokens leave room for."""

    method: str | None = None
    """lora, dora, prompt, prefix, p-tuning, bottleneck, ia3, ln-tuning, bitfit …; several as in `prompt + lora`."""
    adapters: dict[str, AdapterSettings] = Field(default_factory=dict)
    """Named adapters, each with its method, its rate and its options; instead of `method`."""
    composition: str | None = None
    """How the adapters take part, as in `task + 0.5*style`; left out, their sum. With several `datasets`, which have
    compositions of their own: what is active in the saved folder."""
    learning_rate: float | None = Field(default=None, gt=0)
    """For every adapter that has none of its own; left out, each method's tested one, larger for a
    base below 10 million parameters (docs/learning_rates.md)."""
    gates_learning_rate: float | None = Field(default=None, gt=0)
    """For learned gates and routers in the composition; left out, the largest of the adapters'."""

    max_steps: int = -1
    """Stop after so many steps; -1: after `num_train_epochs`."""
    num_train_epochs: float = Field(default=3.0, gt=0)
    """Passes over the data."""
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Rows of a batch, on each device."""
    per_device_eval_batch_size: int = Field(default=8, ge=1)
    """Rows of a batch in evaluation."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches that one step is made of."""
    warmup_steps: float = Field(default=0.03, ge=0)
    """Steps of rising rate; below 1 a share of all steps."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "linear"
    """How the rate falls after the warm-up."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Longest gradient, of each adapter by itself; 0: not clipped."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the adapters' weights."""
    optim: str = "adamw_torch"
    """Optimiser, by its name in transformers."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""
    bf16: bool = False
    """Mixed precision in bfloat16."""
    fp16: bool = False
    """Mixed precision in float16."""
    use_cpu: bool = False
    """Do not use a GPU even if there is one."""
    fsdp: bool = False
    """Leave only a part of the frozen base on each of several processes (FSDP2; docs/devices.md)."""
    auto_find_batch_size: bool = False
    """Halve the batch size until it fits into memory."""
    dataloader_num_workers: int = Field(default=0, ge=0)
    """Processes that prepare batches."""
    verify: bool = True
    """Try one step first, and stop where an adapter would not train."""
    seed: int = 42
    """Of the adapters' start, the split and the order of the data."""

    output_dir: str | None = None
    """Where everything is written; left out, outputs/<model>-<adapters>."""
    overwrite_output_dir: bool = False
    """Replace the results of an earlier run there."""
    resume: bool = False
    """Go on from the last checkpoint in output_dir."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between two lines of the log."""
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to evaluate."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Steps between two evaluations (sets eval_strategy to steps)."""
    eval_on_start: bool = True
    """Evaluate before the first step, to see where training started."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations in a row without a better held-out loss, and save the best adapters, not the last
    ones; left out, train to the end and save the last. A checkpoint is written at each evaluation."""
    early_stopping_threshold: float = Field(default=0.0, ge=0)
    """How much lower the held-out loss must be to count as better."""
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to write a checkpoint."""
    save_steps: int | None = Field(default=None, ge=1)
    """Steps between two checkpoints (sets save_strategy to steps)."""
    save_total_limit: int | None = Field(default=None, ge=1)
    """Keep only so many checkpoints."""
    report_to: str = "none"
    """A tracker of transformers that also gets the figures, such as tensorboard (which reads output_dir/runs)."""

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, values: Any) -> Any:
        """Aliases, steps without their strategy, and `method` with its options as adapters."""
        if not isinstance(values, Mapping):
            raise ValueError(f"settings are names with values; got {values!r}")
        values = renamed(values)
        for kind in ("eval", "save"):
            if f"{kind}_steps" in values:
                values.setdefault(f"{kind}_strategy", "steps")
        if "early_stopping_patience" in values and not {"save_strategy", "save_steps"} & set(values):
            values["save_strategy"] = values.get("eval_strategy", cls.model_fields["eval_strategy"].default)
            values["save_steps"] = values.get("eval_steps")
        if "datasets" in values:
            values["datasets"] = datasets_of(values["datasets"])
        known = {option for method in methods().values() for option in method.names()} - set(cls.model_fields)
        options = {name: values.pop(name) for name in sorted(known & set(values))}
        refuse_unknown(values, [*cls.model_fields, *known], "a run")
        adapters = adapters_of(values, options)
        # Deliberately after: it is what the run's own rate is for.
        if rate := values.get("learning_rate"):
            adapters = {n: {"learning_rate": rate, **a} if isinstance(a, Mapping) else a for n, a in adapters.items()}
        return {**values, "method": None, "adapters": adapters}

    @field_validator("device_map", "max_memory", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        """On the command line a mapping is text, as YAML has it."""
        return yaml.safe_load(value) if isinstance(value, str) and value.startswith("{") else value

    @field_validator("adapters")
    @classmethod
    def _names(cls, adapters: dict[str, AdapterSettings]) -> dict[str, AdapterSettings]:
        for name in adapters:
            check_name(name)
        return adapters

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.max_memory and not self.device_map:
            raise ValueError("max_memory has no effect without device_map: give both, or neither")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other")
        if idle := [name for name, value in self if name.startswith("bnb_4bit_") and value and not self.load_in_4bit]:
            raise ValueError(f"{', '.join(idle)} has no effect without load_in_4bit")
        check_datasets(self)
        check_adapters(self)
        if self.resume and self.overwrite_output_dir:
            raise ValueError("resume goes on with output_dir, overwrite_output_dir replaces it: give one of them")
        for kind in ("eval", "save"):
            steps, strategy = getattr(self, f"{kind}_steps"), getattr(self, f"{kind}_strategy")
            if (steps is None) == (strategy == "steps"):
                raise ValueError(f"{kind}_strategy={strategy} does not go with {kind}_steps={steps}")
        return self

    @model_validator(mode="after")
    def _stopping(self) -> Self:
        if self.early_stopping_patience is None:
            if self.early_stopping_threshold and not self.stops_by_adapter:
                raise ValueError(
                    f"early_stopping_threshold={self.early_stopping_threshold:g} has no effect without "
                    "early_stopping_patience: give both, or neither"
                )
        elif self.eval_strategy == "no":
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} counts evaluations, and eval_strategy=no "
                "makes none: set eval_steps, or eval_strategy to epoch"
            )
        elif not self.stops_by_adapter and (self.save_strategy, self.save_steps) != (
            self.eval_strategy,
            self.eval_steps,
        ):
            raise ValueError(
                f"early_stopping_patience={self.early_stopping_patience} keeps the best evaluation, so each one needs "
                f"its checkpoint; save_strategy={self.save_strategy}, save_steps={self.save_steps} do not go with "
                f"eval_strategy={self.eval_strategy}, eval_steps={self.eval_steps}: leave the first two out"
            )
        return self

    @property
    def quantisation(self) -> dict[str, Any]:
        """How the base is quantised as it is loaded, by the names of transformers' configuration; empty: not at all."""
        if self.load_in_8bit:
            return {"load_in_8bit": True}
        chosen = {name: value for name, value in self if name.startswith("bnb_4bit_") and value}
        return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **chosen} if self.load_in_4bit else {}

    @property
    def spread(self) -> dict[str, Any]:
        """How the base lies on several devices, by the names of transformers; empty: on one."""
        chosen = {"device_map": self.device_map, "max_memory": self.max_memory}
        return {name: value for name, value in chosen.items() if value}

    @property
    def sources(self) -> dict[str, DatasetSettings]:
        """The data sets, those of `data` alone among them, with what they leave to the run filled in."""
        names = DatasetSettings.model_fields
        ours = {name: value for name, value in self if name in names and name != "composition"}
        if not self.datasets:
            return {"data": DatasetSettings.model_construct(**ours, composition=self.composition)}
        return {
            name: one.model_copy(update={k: v for k, v in ours.items() if getattr(one, k) is None})
            for name, one in self.datasets.items()
        }

    @property
    def stops_by_adapter(self) -> bool:
        """Whether each adapter stops by itself; otherwise the whole run does, if anything."""
        own = any(a.early_stopping_patience is not None for a in self.adapters.values())
        return own or (self.early_stopping_patience is not None and bool(self.datasets))

    def with_rates(self, parameters: int) -> Self:
        """The run on a base of so many parameters: no learning rate is left open."""
        found = {
            name: a.model_copy(update={"learning_rate": a.learning_rate or default_rate(a.method, parameters)[0]})
            for name, a in self.adapters.items()
        }
        return self.model_copy(update={"adapters": found})

    def with_steps(self, steps: Mapping[str, int]) -> Self:
        """The run in which each adapter trains for so many steps: no schedule of a method has an open end."""
        found = {
            name: a.model_copy(update={"total_step": steps[name]})
            if "total_step" in method_named(a.method).names() and a.options.get("total_step") is None
            else a
            for name, a in self.adapters.items()
        }
        return self.model_copy(update={"adapters": found})

    def with_tasks(self, tasks: Mapping[str, int]) -> Self:
        """The run in which each adapter that is named tells so many tasks apart, where it leaves that open."""
        found = {
            name: a.model_copy(update={option: tasks[name]})
            if (option := tasks_option(a.method)) and name in tasks and a.options.get(option) is None
            else a
            for name, a in self.adapters.items()
        }
        return self.model_copy(update={"adapters": found})

    def peak_rates(self) -> dict[str, float]:
        """Adapter -> learning rate.

        Raises:
            ValueError: one is left open; see `with_rates`.
        """
        found = {name: a.learning_rate for name, a in self.adapters.items() if a.learning_rate is not None}
        if left := [name for name in self.adapters if name not in found]:
            raise ValueError(f"No learning_rate is given for {', '.join(left)}: give one, or call with_rates() first.")
        return found

    def plain(self) -> dict[str, Any]:
        """The run as plain values, defaults and all, which build the same run again."""
        values = self.model_dump(mode="json", exclude={"method", "resume", "overwrite_output_dir"})
        for group in ("adapters", "datasets"):
            values[group] = {n: {k: v for k, v in a.items() if v is not None} for n, a in values[group].items()}
        return values


class PlannedRun(RunConfig):
    """A run that is only planned: what it trains on may be left open."""

    NEEDS_DATA = False


class DataToCheck(RunConfig):
    """Data that is only looked at."""

    model: str = ""
    """The base whose tokenizer reads the rows, a folder or a hub id; left out, lengths are in characters."""


def explain(error: ValidationError) -> str:
    """Pydantic's findings as one line each, with the setting, what is wrong, and the value."""
    lines: list[str] = []
    for found in error.errors():
        where = ".".join(str(part) for part in found["loc"])
        message = found["msg"].removeprefix("Value error, ")
        if found["type"] == "missing":
            field = RunConfig.model_fields.get(where)
            lines.append(f"{where} is missing" + (f": {field.description}" if field else ""))
        else:
            value = "" if found["type"] == "value_error" else f" (given: {found['input']!r})"
            lines.append(f"{where}: {message}{value}" if where else f"{message}{value}")
    return "\n".join(lines)
