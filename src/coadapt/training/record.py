"""What a run leaves behind while it goes: the log, and a checkpoint where it is interrupted."""

import json
import math
import os
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from coadapt.config import did_you_mean
from coadapt.formats.files import aside
from coadapt.training.processes import on_any

FINAL = "train_runtime"
"""A key of the summary that Trainer logs after the last step."""


def named(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer's names as trackers have them: `train/loss`, `eval/loss`."""
    found: dict[str, Any] = {}
    for name, value in logs.items():
        group, _, rest = name.partition("_")
        known = group in ("train", "eval") and rest
        found[name if name in ("epoch", "step") else f"{group}/{rest}" if known else f"train/{name}"] = value
    return found


def held_out_losses(line: Mapping[str, Any]) -> dict[str, float]:
    """Data set -> its held-out loss, where there are several: `eval/NAME/loss`, with Trainer `eval_NAME/loss`."""
    found = {key: key.removeprefix("eval").removesuffix("/loss") for key in line if key.startswith(("eval/", "eval_"))}
    return {name[1:]: line[key] for key, name in found.items() if key.endswith("/loss") and len(name) > 1}


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


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Adds a line to a metrics file, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    before = file.stat().st_size if file.is_file() else 0
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")
    except OSError as error:
        with suppress(OSError):
            os.truncate(file, before)
        raise OSError(f"{file} could not be written: {error}. Make room, then go on with --resume.") from error


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none where there is none. A last line that was cut off is left out.

    Raises:
        ValueError: another line is damaged; names it.
    """
    if not file.is_file():
        return []
    lines = file.read_text("utf-8", errors="replace").splitlines(keepends=True)
    return [_line(file, number, line) for number, line in enumerate(lines, 1) if line.endswith("\n")]


def _line(file: Path, number: int, line: str) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
    raise ValueError(f"{file}, line {number} is damaged: {line.strip()[:80]!r}. Mend that line, or take it out.")


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
