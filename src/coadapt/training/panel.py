"""What a person sees while a run goes: a panel that is redrawn on a terminal, one line for each log entry elsewhere."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel as Box
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coadapt.training import memory
from coadapt.training.log import Figures, figures_in, held_out_losses, values_in
from coadapt.training.monitor import Stillness
from coadapt.training.palette import HELD_OUT, TRAIN, adapter_colors
from coadapt.training.record import Interrupt
from coadapt.training.units import duration

POINTS, WIDEST, ROWS = 40, 96, 12
"""Points of the small loss curve, columns of the panel, and its rows without those of the adapters."""
COLUMNS = {
    "learning_rate": ("rate", 1),
    "grad_norm": ("gradient", 3),
    "update_norm": ("update", 2),
    "update_ratio": ("relative", 4),
}
"""Figure -> its title, and how many columns there must be room for to show it."""
EXTRAS = {"effective_rank": "rank", "gate": "gate"}
"""The same of those that are shown where an adapter has them and no name has to be cut for them."""
COLUMN, LONGEST, STILL = 10, 24, "stands still"
"""Width of a column and the most of a name's, and the mark of an adapter that does not move."""
BLOCKS = "▁▂▃▄▅▆▇█"


class Screen(TrainerCallback):
    """What both ways of showing a run share: its speed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.clock, self.tokens, self.steps = 0.0, 0, 0

    def stop(self) -> None:
        """Ends what is drawn; to be called however the run ended."""

    def _restart(self, state: TrainerState) -> None:
        self.clock, self.tokens, self.steps = time.monotonic(), state.num_input_tokens_seen, state.global_step

    def _speed(self, state: TrainerState) -> tuple[str, float]:
        """Tokens a second (steps, where there are none) and seconds a step, since `_restart`."""
        seconds = max(time.monotonic() - self.clock, 1e-9)
        tokens, each = state.num_input_tokens_seen - self.tokens, seconds / max(state.global_step - self.steps, 1)
        return f"{tokens / seconds:,.0f} tokens/s" if tokens else f"{1 / each:.1f} steps/s", each


class Lines(Screen):
    """One line for each log entry."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restart(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        where = f"step {state.global_step}/{state.max_steps} · "
        if "loss" in logs:
            self.console.print(Text(where + self._line(state, logs)), soft_wrap=True)
        elif "eval_loss" in logs:
            self.console.print(Text(where + " · ".join(held_out(logs)), "bold"), soft_wrap=True)
        self._restart(state)

    def _line(self, state: TrainerState, logs: Mapping[str, Any]) -> str:
        speed, each = self._speed(state)
        rates = {name: f"{of['learning_rate']:.1e}" for name, of in figures_in(logs).items()}
        rate = ", ".join(f"{k} {v}" for k, v in rates.items()) if len(rates) > 1 else f"{logs['learning_rate']:.1e}"
        left = duration(each * (state.max_steps - state.global_step))
        parts = [f"loss {logs['loss']:.4f}", f"rate {rate}", speed]
        return " · ".join([*parts, f"peak {memory.size(memory.peak())}", f"{left} left"])


class Panel(Screen):
    """A panel at the foot of the terminal; other lines appear above it, and its last state stays.

    Args:
        stillness: who is marked as standing still.
        interrupt: whether the run was asked to stop.
    """

    def __init__(self, console: Console, stillness: Stillness, interrupt: Interrupt) -> None:
        super().__init__(console)
        self.stillness = stillness
        self.interrupt = interrupt
        self.live: Live | None = None
        self.phase = "preparing"
        self.step, self.last, self.first, self.epoch = 0, 1, 0, 0.0
        self.begun = self.ended = 0.0
        self.losses: deque[float] = deque(maxlen=POINTS)
        self.held_out: list[tuple[int, float]] = []
        self.accuracy: float | None = None
        self.apart: dict[str, float] = {}
        self.speed: str | None = None
        self.memory = ""
        self.figures: Figures = {}
        self.spikes = 0

    # ---- what happens ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stop()  # Trainer begins again where it halves the batch size
        self._restart(state)
        self.begun, self.ended, self.phase = self.clock, 0.0, "training"
        self.losses.clear()
        self.held_out.clear()
        self.step = self.first = state.global_step
        self.last, self.epoch = state.max_steps, state.epoch or 0.0
        for line in state.log_history:
            self._take(line)
        self.live = Live(console=self.console, get_renderable=self.drawn, refresh_per_second=4)
        self.live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step, self.epoch, self.phase = state.global_step, state.epoch or 0.0, "training"

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.phase = "evaluating"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if "loss" in logs:
            self.speed, _each = self._speed(state)
            peak, device = memory.size(memory.peak()), memory.size(memory.total())
            self.memory = f"{memory.size(memory.now())} now · peak {peak} of {device}"
        self._take({"step": state.global_step, **logs})
        self.phase = "training"
        self._restart(state)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "loss" in line:
            self.losses.append(line["loss"])
            # A step that was not measured keeps the norms of the last one that was.
            self.figures = {name: {**self.figures.get(name, {}), **of} for name, of in figures_in(line).items()}
            for name, gate in values_in(line, "gate").items():
                if name in self.figures:
                    self.figures[name]["gate"] = gate
            self.spikes = line.get("loss_spikes", 0)
        if "eval_loss" in line:
            self.held_out.append((line["step"], line["eval_loss"]))
            self.accuracy = line.get("eval_accuracy")
            self.apart = held_out_losses(line)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.phase = "stopped" if self.interrupt.asked else "done"
        self.stop()

    def stop(self) -> None:
        """Draws the last state, which stays, and gives the terminal back."""
        if self.live is not None:
            self.ended = time.monotonic()
            self.phase = self.phase if self.phase == "done" else "stopped"
            self.live.stop()
            self.live = None

    # ---- how it looks ------------------------------------------------------------------------------------------------

    def drawn(self) -> RenderableType:
        """The panel as it stands now."""
        width = min(self.console.width, WIDEST)
        inner = width - 4
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(ratio=1)
        line.add_column(justify="right", width=4)
        share = f"{self.step / max(self.last, 1):.0%}"
        line.add_row(
            ProgressBar(total=self.last, completed=self.step, complete_style=TRAIN, finished_style=TRAIN), share
        )
        doing = f"step {self.step:,} of {self.last:,} · epoch {self.epoch:.2f} · {self._doing()}"
        title = Text(doing, "not dim bold", overflow="ellipsis", no_wrap=True)
        # The last state may be longer than the terminal: nothing is drawn over it any more.
        fits = bool(self.ended) or self.console.height >= ROWS + len(self.figures) + bool(self.apart)
        parts: list[RenderableType] = [line, "", self._facts(inner)] if fits else [line, self._facts(inner, short=True)]
        if fits and self.figures:
            parts += ["", self._adapters(inner)]
        box = Box(Group(*parts), title=title, title_align="left", box=ROUNDED, width=width, border_style="dim")
        # The cursor waits on a line of its own, where the `^C` that a terminal writes breaks nothing.
        return box if self.ended else Group(box, "")

    def _doing(self) -> str:
        asked = self.interrupt.asked and self.phase in ("training", "evaluating")
        return "stopping, with a checkpoint" if asked else self.phase

    def _facts(self, width: int, short: bool = False) -> Table:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True, min_width=8)
        facts.add_column(no_wrap=True, overflow="ellipsis")
        loss = Text("…")
        if self.losses:
            spikes = f"  {self.spikes} spike{'s' * (self.spikes > 1)}" if self.spikes else ""
            room = max(min(POINTS, width - 22 - len(spikes)), 0)
            loss = Text.assemble(
                (f"{self.losses[-1]:<8.4f}", f"bold {TRAIN}"),
                "  ",
                (sparkline(list(self.losses)[max(len(self.losses) - room, 0) :]), TRAIN),
                (spikes, "yellow"),
            )
        facts.add_row("loss", loss)
        if self.held_out:
            step, best = min(self.held_out, key=lambda found: found[1])
            accuracy = "" if self.accuracy is None else f"  accuracy {self.accuracy:.1%}"
            latest = (f"{self.held_out[-1][1]:<8.4f}", f"bold {HELD_OUT}")
            facts.add_row("held out", Text.assemble(latest, accuracy, (f"  best {best:.4f} at step {step:,}", "dim")))
        if self.apart and not short:
            facts.add_row("", Text(" · ".join(f"{name} {loss:.4f}" for name, loss in self.apart.items()), HELD_OUT))
        facts.add_row("speed", self.speed or "…")
        facts.add_row("time", self._time())
        if not short:
            facts.add_row("memory", self.memory or "…")
        return facts

    def _time(self) -> str:
        spent, made = (self.ended or time.monotonic()) - self.begun, self.step - self.first
        if not made or self.ended:
            return f"{duration(spent)} spent"
        return f"{duration(spent)} spent · {duration(spent / made * (self.last - self.step))} left"

    def _adapters(self, width: int) -> Table:
        mark = STILL if width > 60 else "!"
        titles = self._titles(width - len(mark) - 2)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        longest = min(max(width - len(mark) - 2 - COLUMN * len(titles), 4), LONGEST)
        table.add_column("adapter", no_wrap=True, overflow="ellipsis", max_width=longest)
        for title in titles.values():
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, style="yellow")
        colors = adapter_colors(self.figures)
        for name, of in self.figures.items():
            row = ["" if f in EXTRAS and f not in of else _shown(f, of.get(f)) for f in titles]
            table.add_row(Text(name, colors[name]), *row, mark if self.stillness.stands_still(name) else "")
        return table

    def _titles(self, width: int) -> dict[str, str]:
        """The figures that there is room for, with their titles."""
        room = max((width - 12) // COLUMN, 1)
        titles = {figure: title for figure, (title, needed) in COLUMNS.items() if needed <= room}
        name = min(max(map(len, ("adapter", *self.figures))), LONGEST)
        there = {figure for of in self.figures.values() for figure in of}
        more = max((width - name) // COLUMN - len(COLUMNS), 0)
        return titles | dict([(f, title) for f, title in EXTRAS.items() if f in there][:more])


def screen(console: Console, stillness: Stillness, interrupt: Interrupt) -> Screen:
    """The panel on a terminal, lines elsewhere."""
    drawable = console.is_terminal and not console.is_dumb_terminal
    return Panel(console, stillness, interrupt) if drawable else Lines(console)


def held_out(logs: Mapping[str, Any]) -> list[str]:
    """What an evaluation found."""
    apart = ", ".join(f"{name} {loss:.4f}" for name, loss in held_out_losses(logs).items())
    figures = [f"held-out loss {logs['eval_loss']:.4f}" + (f" ({apart})" if apart else "")]
    return figures + ([f"accuracy {logs['eval_accuracy']:.1%}"] if "eval_accuracy" in logs else [])


def sparkline(values: Sequence[float]) -> str:
    """A curve one line high, a character for each value; logarithmic where all are above 0."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    scale = math.log if min(finite) > 0 else float
    low, high = scale(min(finite)), scale(max(finite))
    top = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((scale(v) - low) * top)] if math.isfinite(v) else " " for v in values)


def _shown(figure: str, value: float | None) -> str:
    if value is None:
        return "…"
    return f"{_short(100 * value)}%" if figure == "update_ratio" else _short(value)


def _short(value: float) -> str:
    """Three digits."""
    if value == 0 or 1e-3 <= value < 1e4:
        return f"{value:.3g}"
    number, _, power = f"{value:.1e}".partition("e")
    return f"{number}e{int(power)}"
