"""How the rows of a step are shared out: rows of a batch, batches, processes. A resumed run keeps the rows of a step.

So the same step has the same rows, whatever number of processes computes it: totals, learning rates and what is left of
an epoch stay as they were.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from coadapt.formats.files import read_json
from coadapt.training import processes
from coadapt.training.settings import RunConfig

BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
STATE = "trainer_state.json"
"""What Trainer writes last into a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one step is made of."""

    batch: int
    """Rows of a batch on one device."""
    accumulation: int
    """Batches of a process."""
    processes: int

    @property
    def rows(self) -> int:
        """Of one step."""
        return self.batch * self.accumulation * self.processes

    def __str__(self) -> str:
        many = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{many} x {BATCH}={self.batch} x {ACCUMULATION}={self.accumulation}"


def wanted(run: RunConfig) -> Share:
    """As the settings have it, with the processes that there are."""
    return Share(
        batch=run.per_device_train_batch_size,
        accumulation=run.gradient_accumulation_steps,
        processes=processes.count(),
    )


def taken_up(run: RunConfig, before: Mapping[str, Any], then: Share) -> RunConfig:
    """The run with batches such that a step has the rows that it had in the run which is resumed.

    Args:
        before: the settings of that run, as it was told them; what is told otherwise now is kept to.
        then: how it shared them.

    Raises:
        ValueError: the processes that there are, or a batch size that was given anew, cannot have so many.
    """
    now = wanted(run)
    if now.rows == then.rows or run.auto_find_batch_size:
        return run
    each, rest = divmod(then.rows, now.processes)
    batch = None if now.batch == before[BATCH] else now.batch
    accumulation = None if now.accumulation == before[ACCUMULATION] else now.accumulation
    if batch is None:
        fits = [n for n in range(1, each + 1) if each % n == 0]
        batch = each // accumulation if accumulation else max((n for n in fits if n <= then.batch), default=1)
    accumulation = accumulation or each // batch
    found = Share(batch=batch, accumulation=accumulation, processes=now.processes)
    if rest or found.rows != then.rows:
        possible = ", ".join(str(n) for n in range(1, then.rows + 1) if then.rows % n == 0)
        raise ValueError(
            f"resume: a step had {then.rows} rows ({then}), and cannot have as many with {now}. Start as many "
            f"processes as divide them ({possible}) and leave both settings as they were, or begin anew "
            "(--overwrite-output-dir)."
        )
    return run.model_copy(update={BATCH: found.batch, ACCUMULATION: found.accumulation})


def recorded(checkpoint: Path) -> Share | None:
    """How the run that wrote a checkpoint shared its rows; None: an older version, which did not say."""
    kept = read_json(checkpoint / STATE).get("stateful_callbacks", {}).get(Recorder.__name__)
    return Share(**kept["attributes"]) if kept else None


def found(checkpoint: Path, before: Mapping[str, Any]) -> Share:
    """The same; of an older version from its settings, and the files that each process has left."""
    written = max(len(list(checkpoint.glob("rng_state_*.pth"))), 1)  # one alone writes rng_state.pth
    return recorded(checkpoint) or Share(batch=before[BATCH], accumulation=before[ACCUMULATION], processes=written)


class Recorder(TrainerCallback, ExportableState):
    """Writes into each checkpoint how the rows of a step are shared, as `share` says it then."""

    def __init__(self, share: Callable[[], Share]) -> None:
        self.share = share

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": dict(vars(self.share()))}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # A checkpoint of an older version has no entry, and Trainer expects one when it saves the next.
        kept = cast(dict[str, Any], state.stateful_callbacks)
        kept.setdefault(type(self).__name__, self.state())
