"""How far each adapter moves: the norms of its gradient and of its update, and a word about one that stands still."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coadapt.model import PeftModel
from coadapt.training.record import append

Figures = dict[str, dict[str, float]]
"""Group -> figure -> value."""

LOGGED_STEPS = 3
"""So many logged steps in a row without moving, and an adapter is said to stand still."""
TOO_SMALL = 1e-4
"""An update of less than this share of another adapter's, both relative to their parameters. Rates that are published
for methods lie within a factor of 1000."""


class Monitor:
    """Clips each optimiser group by itself and measures it, at the steps that will be logged.

    To be called right before and right after the optimiser's own step, with the gradients that the step uses:
    accumulated, and no longer scaled.
    """

    def __init__(self) -> None:
        self.figures: Figures = {}
        """Group -> `learning_rate`, and where it was measured: `grad_norm` (before clipping), `update_norm` (of the
        difference that the step made), `update_ratio` (that, relative to the parameters after the step)."""
        self._gradients: dict[str, Tensor] = {}
        self._copies: dict[str, list[Tensor]] = {}

    def before_step(self, groups: Sequence[Mapping[str, Any]], measure: bool) -> None:
        """Clips; if `measure`, keeps the gradients' norms and a copy of the parameters."""
        self.figures = {group["name"]: {"learning_rate": float(group["lr"])} for group in groups}
        for group in groups:
            name, longest = group["name"], group["max_grad_norm"]
            if not measure and not longest:
                continue
            norm = get_total_norm([p.grad for p in group["params"] if p.grad is not None])
            if longest:
                clip_grads_with_norm_(group["params"], longest, norm)
            if measure:
                self._gradients[name] = norm
                self._copies[name] = [p.detach().clone() for p in group["params"]]

    def after_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The figures of a step that was measured; the copy is given up."""
        for group in groups:
            if (before := self._copies.pop(group["name"], None)) is None:
                continue
            now = [p.detach() for p in group["params"]]
            update = float(get_total_norm([p - old for p, old in zip(now, before, strict=True)]))
            self.figures[group["name"]] |= {
                "grad_norm": float(self._gradients.pop(group["name"])),
                "update_norm": update,
                "update_ratio": update / float(get_total_norm(now)) if update else 0.0,
            }

    def logs(self) -> dict[str, float]:
        """The figures under the names that they are logged by: `grad_norm/task`."""
        return {f"{figure}/{name}": value for name, of in self.figures.items() for figure, value in of.items()}


def figures_in(logs: Mapping[str, Any]) -> Figures:
    """The figures of each adapter in a line of the log, with or without the `train/` that trackers have."""
    found: Figures = {}
    for key, value in logs.items():
        figure, slash, name = key.removeprefix("train/").partition("/")
        if slash and figure in ("learning_rate", "grad_norm", "update_norm", "update_ratio"):
            found.setdefault(name, {})[figure] = value
    return found


class Stillness(TrainerCallback):
    """Tells once of each adapter that does not move, or moves by a share of another's that cannot be right.

    Args:
        tell: gets the step and the message.
    """

    def __init__(self, view: PeftModel, tell: Callable[[int, str], None]) -> None:
        self.view = view
        self.tell = tell
        self.still: dict[str, int] = {}
        """Adapter -> logged steps in a row without moving."""
        self._told: set[str] = set()

    def stands_still(self, name: str) -> bool:
        """Whether the adapter has not moved for several logged steps."""
        return self.still.get(name, 0) >= LOGGED_STEPS

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.still.clear()
        # A resumed run begins as the unbroken one would stand here: what was told is in its log.
        for line in state.log_history:
            self._told |= set(self._count(figures_in(line)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        figures = figures_in(logs)
        for name in self._count(figures):
            if name not in self._told:
                self._told.add(name)
                self.tell(state.global_step, self._message(name, figures))

    def _count(self, figures: Figures) -> list[str]:
        """Who stands still by now."""
        measured = {name: of for name, of in figures.items() if "update_norm" in of}
        for name in measured:
            self.still[name] = self.still.get(name, 0) + 1 if _unmoved(name, measured) else 0
        return [name for name in measured if self.stands_still(name)]

    def _message(self, name: str, figures: Figures) -> str:
        of = figures[name]
        what = "its gradient is 0" if not of["grad_norm"] else f"its updates have norm {of['update_norm']:.1e}"
        return (
            f"{name!r} stands still: {what} for {LOGGED_STEPS} logged steps. "
            f"Likely reason: {self._reason(name, figures)}."
        )

    def _reason(self, name: str, figures: Figures) -> str:
        of, rate = figures[name], figures[name]["learning_rate"]
        module: nn.Module = self.view.gates if name == "gates" else self.view.get_adapter(name)
        if not any(p.requires_grad for p in module.parameters()):
            return "it is frozen"
        if name != "gates" and name not in self.view.active_adapters:
            return f"it is not in the composition {self.view.composition!r}"
        if not of["grad_norm"]:
            return f"its gate in {self.view.composition!r} is 0, or no row of the data uses it"
        if not rate:
            return "its learning rate is 0"
        if not of["update_norm"]:
            return f"its learning rate {rate:.1e} is too small to change its parameters"
        other = max(figures, key=lambda n: figures[n].get("update_ratio", 0.0))
        times = figures[other]["update_ratio"] / of["update_ratio"]
        theirs = figures[other]["learning_rate"]
        return f"its learning rate {rate:.1e}; {other!r} at {theirs:.1e} moves {times:,.0f} times as far"


def _unmoved(name: str, figures: Figures) -> bool:
    of = figures[name]
    largest = max(f["update_ratio"] for f in figures.values())
    return not of["grad_norm"] or not of["update_norm"] or of["update_ratio"] < TOO_SMALL * largest


def teller(console: Console, file: Path) -> Callable[[int, str], None]:
    """Says a warning on `console`, and as a line of the log in `file`."""

    def tell(step: int, message: str) -> None:
        console.print(Text(f"warning: {message}", "yellow"), soft_wrap=not console.is_terminal)
        append(file, {"step": step, "warning": message})

    return tell
