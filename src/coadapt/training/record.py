"""What a run leaves behind while it goes: the log, and a checkpoint where it is interrupted."""

import json
import math
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, cast

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from coadapt.config import did_you_mean
from coadapt.formats.files import aside
from coadapt.training.log import append, named, read_log
from coadapt.training.processes import on_any

FINAL = "train_runtime"
"""A key of the summary that Trainer logs after the last step."""


class MetricsLog(TrainerCallback):
    """Appends each line of the log to a JSON-lines file; after a resume, to those up to the checkpoint."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        kept = [line for line in read_log(self.file) if line["step"] <= state.global_step] if state.global_step else []
        with aside(self.file) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if FINAL in logs and "loss" not in logs:
            return
        append(self.file, named({"step": state.global_step, **logs}))


class Watch(TrainerCallback):
    """Stops a run whose loss is no number any more, and logs wherever a checkpoint is written.

    The second makes a resumed run's log equal to an unbroken one's: what is logged is a mean since the last line.

    Raises:
        ValueError: the loss is not finite; names the step and what helps.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= control.should_save or control.should_evaluate

    on_epoch_end = on_step_end

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} at step {state.global_step}. Use a lower learning_rate or max_grad_norm, more "
                "warmup_steps, or bf16 in place of fp16."
            )


class EarlyStop(EarlyStoppingCallback):
    """transformers' early stopping; a resumed run counts on from where its checkpoint was.

    Raises:
        ValueError: the run that is resumed has stopped early already.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        # A checkpoint of a run without early stopping has no entry, and Trainer expects one when it saves the next.
        kept = cast(dict[str, Any], state.stateful_callbacks)
        before = kept.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = before["attributes"]["early_stopping_patience_counter"]
        if self.stopped:
            raise ValueError(
                f"resume: the run stopped at step {state.global_step}, after {self.early_stopping_patience_counter} "
                f"evaluations without a better held-out loss (early_stopping_patience={self.early_stopping_patience}). "
                "Raise early_stopping_patience to go on."
            )

    @property
    def stopped(self) -> bool:
        """Whether there were as many evaluations without a better loss as it takes."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class Interrupt(TrainerCallback):
    """As a context: the first Ctrl-C ends training after this step, with a checkpoint; the second ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.asked = on_any(self.asked, args.device)  # the others would wait for a step that does not come
        if self.asked:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            # The epoch did not end, training did. An evaluation now would draw random numbers before a second save.
            control.should_save = control.should_evaluate = False


def check_tracker(name: str) -> None:
    """Whether `report_to` names a tracker that is there; its callback is made by Trainer.

    Raises:
        ValueError: there is no such tracker, or it is not installed; says how to install it.
    """
    known = ["none", "all", *INTEGRATION_TO_CALLBACK]
    if name not in known:
        raise ValueError(f"report_to={name!r} is no tracker.{did_you_mean(name, known)} There are: {', '.join(known)}.")
    if name in ("none", "all") or name in get_available_reporting_integrations():
        return
    package = '"coadapt[tensorboard]"' if name == "tensorboard" else name
    raise ValueError(f"report_to={name!r} asks for a program that is not installed. Run: pip install {package}")
