"""The panel that a person sees: what stands in it, that it fits, and that its last state stays."""

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from transformers import TrainerControl, TrainerState, TrainingArguments

from coadapt.training.monitor import Stillness
from coadapt.training.panel import Lines, Panel, screen, sparkline
from coadapt.training.record import Interrupt
from coadapt.training.run import train
from coadapt.training.settings import RunConfig
from coadapt.training.units import duration

ADAPTERS: dict[str, Any] = {
    "style": {"method": "lora", "r": 2, "learning_rate": 1e-2},
    "an-adapter-with-a-long-name": {"method": "prompt", "num_virtual_tokens": 2, "learning_rate": 1e-14},
}


def shown(text: str) -> list[list[str]]:
    """The panels that were drawn one over the other, each as its lines."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    return [found.splitlines() for found in re.findall(r"╭─ .*?╰─+╯", plain, re.DOTALL)]


@pytest.fixture(scope="module", params=[120, 80, 44])
def drawn(request: pytest.FixtureRequest, base: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(columns, what a run wrote to a terminal that has so many)"""
    file = io.StringIO()
    settings: dict[str, Any] = {
        "max_steps": 8,
        "logging_steps": 1,
        "use_cpu": True,
        "eval_steps": 4,
        "save_strategy": "no",
    }
    out = tmp_path_factory.mktemp("out")
    run = RunConfig(model=base, data=rows, output_dir=str(out), adapters=ADAPTERS, **settings)
    console = Console(file=file, force_terminal=True, width=request.param, height=50, color_system="truecolor")
    train(run, console)
    return request.param, file.getvalue()


def test_the_last_state_stays_and_has_everything(drawn: tuple[int, str]) -> None:
    columns, text = drawn
    last = shown(text)[-1]
    whole = "\n".join(last)
    assert re.search(r"step 8 of 8 · epoch \d\.\d\d · done", last[0])
    assert "100%" in last[1]
    assert re.search(r"loss +\d\.\d{4} +[▁▂▃▄▅▆▇█]{8}", whole)
    assert re.search(r"held out +\d\.\d{4} +best \d\.\d{4}" + (r" at step \d" if columns > 60 else ""), whole)
    assert re.search(r"speed +[\d,]+ tokens/s", whole)
    assert re.search(r"memory +\d.* now · peak \d", whole)
    [style] = [line.split() for line in last if "style" in line]
    [still] = [line for line in last if "an-adap" in line]
    assert "stands still" in still if columns > 60 else "!" in still
    # Where no name has to be cut for it, the effective rank stands beside the rate and the norms.
    assert len(style) - 3 == {120: 5, 80: 4, 44: 2}[columns]
    assert ("rank" in whole) == (columns == 120)
    assert "…" not in "".join(style)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_it_fits_and_stays_whole_where_other_lines_are_printed(drawn: tuple[int, str]) -> None:
    columns, text = drawn
    frames = shown(text)
    assert {len(line) for frame in frames for line in frame} == {min(columns, 96)}
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\s", "", text).count("warning:'an-adapter-with-a-long-name'standsstill") == 1


def begun(**console: Any) -> tuple[Panel, TrainerState, Callable[[str], str]]:
    """A panel that has begun, the state that it is told of, and what it shows."""
    screen = Console(file=io.StringIO(), width=80, height=40, **console)
    panel = Panel(screen, Stillness(None, lambda step, message: None), Interrupt())  # type: ignore[arg-type]
    state = TrainerState(max_steps=100, num_input_tokens_seen=0)
    panel.on_train_begin(TrainingArguments(report_to="none"), state, TrainerControl())

    def text(style: str = "plain") -> str:
        # Not on the panel's own console, which draws it a second time.
        file = io.StringIO()
        Console(file=file, width=80, **console).print(panel.drawn())
        return Text.from_ansi(file.getvalue()).plain if style == "plain" else file.getvalue()

    return panel, state, text


@pytest.fixture
def told() -> Any:
    panel, state, text = begun(force_terminal=True, color_system="truecolor")
    yield panel, state, text
    panel.stop()


def log(panel: Panel, state: TrainerState, **logs: Any) -> None:
    panel.on_step_end(TrainingArguments(report_to="none"), state, TrainerControl())
    panel.on_log(TrainingArguments(report_to="none"), state, TrainerControl(), logs)


def test_the_best_evaluation_is_remembered(told: Any) -> None:
    panel, state, text = told
    for step, loss in ((10, 2.0), (20, 0.5), (30, 0.75)):
        state.global_step = step
        log(panel, state, eval_loss=loss, eval_accuracy=0.25)
    assert re.search(r"held out +0\.7500 +accuracy 25\.0% +best 0\.5000 at step 20", text())


def test_a_line_without_norms_keeps_those_of_the_last_one_that_had_them(told: Any) -> None:
    panel, state, text = told
    state.global_step = 2
    log(panel, state, **{"loss": 1.0, "learning_rate/a": 0.25, "grad_norm/a": 3e-5, "update_norm/a": 7.0})
    log(panel, state, **{"loss": 1.0, "learning_rate/a": 0.125})
    [line] = [line.split()[1:5] for line in text().splitlines() if " a " in line]
    assert line == ["a", "0.125", "3.0e-5", "7"]


def test_rank_and_gate_where_an_adapter_has_them_and_there_is_room(told: Any) -> None:
    panel, state, text = told
    log(panel, state, **{"loss": 1.0, "learning_rate/a": 0.5, "learning_rate/b": 0.5, "effective_rank/a": 3.25})
    assert "rank" in text()
    assert "gate" not in text()
    log(
        panel, state, **{"loss": 1.0, "learning_rate/a": 0.5, "learning_rate/b": 0.5, "gate/b": 0.75, "gate/a + b": 9.0}
    )
    [titles] = [line.split() for line in text().splitlines() if "gradient" in line]
    assert titles[1:-1] == ["adapter", "rate", "gradient", "update", "relative", "rank"]  # 80 columns are full
    panel.console.width = 100
    drawn = panel._adapters(92)
    assert [column.header for column in drawn.columns][-3:-1] == ["rank", "gate"]
    assert [list(column.cells)[-2:] for column in drawn.columns][-3:-1] == [["3.25", ""], ["", "0.75"]]


def test_spikes_are_counted_beside_the_loss(told: Any) -> None:
    panel, state, text = told
    log(panel, state, loss=1.0, loss_spikes=0)
    assert "spike" not in text()
    log(panel, state, loss=9.0, loss_spikes=1)
    assert re.search(r"loss +9\.0000 +▁█ +1 spike ", text())
    for _ in range(60):
        log(panel, state, loss=9.0, loss_spikes=2)
    assert re.search("loss +9\\.0000 +▁+ +2 spikes +│", text())
    narrow = Console(file=io.StringIO(), width=44)
    narrow.print(panel._facts(40))  # the curve makes room
    assert re.search("▁  2 spikes$", narrow.file.getvalue().splitlines()[0].rstrip())  # type: ignore[attr-defined]


def test_a_person_who_asks_it_to_stop_is_answered(told: Any) -> None:
    panel, _, text = told
    panel.interrupt.asked = True
    assert "stopping, with a checkpoint" in text()
    panel.stop()
    assert "stopped" in text()


def test_a_run_that_begins_again_with_smaller_batches_is_drawn_anew(told: Any) -> None:
    panel, state, text = told
    log(panel, state, loss=9.0)
    panel.on_train_begin(TrainingArguments(report_to="none"), state, TrainerControl())
    assert "9.0000" not in text()
    log(panel, state, loss=3.0)
    assert re.search("loss +3\\.0000 +▁ ", text())


def test_a_low_terminal_gets_fewer_rows_until_the_run_has_ended(told: Any) -> None:
    panel, state, text = told
    log(panel, state, **{"loss": 1.0, "learning_rate/a": 0.25, "eval_loss": 2.0})
    whole = len(text().splitlines())
    panel.console.height = whole
    assert " a " in text()
    panel.console.height = whole - 1
    assert " a " not in text()
    assert len(text().splitlines()) <= 9
    panel.stop()
    assert " a " in text()


def test_no_color_means_none(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    panel, state, text = told
    log(panel, state, loss=1.0)
    assert "38;2;43;108;176" in text("ansi")
    monkeypatch.setenv("NO_COLOR", "1")
    other, state, text = begun(force_terminal=True)
    log(other, state, loss=1.0)
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-8]|9[0-7])[;m]", text("ansi"))
    other.stop()


@pytest.mark.parametrize(
    "terminal", [{"force_terminal": False}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}]
)
def test_lines_where_nothing_can_be_redrawn(terminal: dict[str, Any]) -> None:
    assert isinstance(screen(Console(file=io.StringIO(), **terminal), None, Interrupt()), Lines)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "curve"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([8.0, 4.0, 2.0, 1.0], "█▆▃▁"),
        ([-1.0, 0.0, 6.0], "▁▂█"),
        ([1.0, float("nan"), 2.0], "▁ █"),
    ],
)
def test_a_curve_one_line_high(values: list[float], curve: str) -> None:
    assert sparkline(values) == curve


@pytest.mark.parametrize(("seconds", "text"), [(4.6, "0:05"), (75, "1:15"), (3661, "1:01:01")])
def test_times_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
