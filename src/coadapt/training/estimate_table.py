"""An estimate as a person reads it."""

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from coadapt.training.estimate import KEPT, MOST, Estimate
from coadapt.training.units import size


def tables(found: Estimate) -> Iterator[Table | Text]:
    """The run, its bytes part by part, and what that means here."""
    yield _run(found)
    yield Text()
    yield _bytes(found)
    yield Text()
    yield _here(found)


def _two_columns() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _run(found: Estimate) -> Table:
    table = _two_columns()
    each = ", ".join(m if len(found.adapters) == 1 else f"{name} ({m})" for name, m in found.adapters.items())
    table.add_row("model", Text(found.model))
    table.add_row("adapters", Text(each))
    table.add_row("task", found.task)
    table.add_row("parameters", f"{found.parameters:,}, of which {found.trainable:,} train ({found.share:.2%})")
    table.add_row("batch", batch(found))
    return table


def batch(found: Estimate) -> str:
    """`8 rows of 512 tokens`"""
    rows = f"{found.rows} row{'s' * (found.rows > 1)}"
    if not found.length:
        return f"{rows}, images"
    target = f" and targets of {found.target}" if found.target else ""
    return f"{rows} of {found.length} tokens{target}"


def _bytes(found: Estimate) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="memory of a step", title_justify="left", title_style="bold")
    for name in ("", "bytes", ""):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    step, parts = found.step, found.parts
    for name, (count, what) in parts.items():
        table.add_row(name, size(count), Text(what, "dim"))
    table.add_row("sum", size(sum(count for count, _ in parts.values())))
    told = f"the most at once, counted: in the {step.phase}"
    table.add_row("peak", Text(size(step.peak), "" if found.measured else "bold"), Text(told, "dim"))
    if found.measured is not None:
        off = step.peak / found.measured.peak - 1
        table.add_row(
            "measured", Text(size(found.measured.peak), "bold"), Text(f"the count is off by {off:+.1%}", "dim")
        )
    for name, count in (("evaluation", found.evaluation), ("step tried first", found.trial)):
        if count > step.peak:
            table.add_row(name, Text(size(count), "bold"), Text("more than a step: this is the run's peak", "dim"))
    if found.measured is not None and found.device == "cpu":
        table.add_row("process", size(found.measured.rss), Text("resident set, libraries and all", "dim"))
    return table


def _here(found: Estimate) -> Table:
    table, room = _two_columns(), found.room
    table.add_row(
        "here", f"{size(room.free)} of {size(room.total)} are free ({found.device}); {KEPT:.0%} are left alone"
    )
    verdict = Text("it fits", "green") if found.fits else Text("it does not fit", "bold red")
    table.add_row("verdict", verdict)
    most = found.largest_batch
    told = f"{most:,} rows of this length" if most < MOST else f"more than {MOST:,} rows of this length"
    table.add_row("largest batch", told if most else "not even one row fits")
    if found.measured is not None:
        reached = flops(found.operations / found.measured.seconds)
        table.add_row("time of a step", f"{seconds(found.seconds)}, measured: {flops(found.operations)}, {reached}/s")
    else:
        reached = f"{flops(found.rate)}/s in a product of matrices here"
        told = f"at least {seconds(found.seconds)}: {flops(found.operations)}, {reached}; --calibrate measures"
        table.add_row("time of a step", told)
    if advice := _advice(found):
        table.add_row("to do", Text(advice))
    return table


def flops(operations: float) -> str:
    """`12.3 TFLOP` or `45.6 GFLOP`: floating point operations."""
    return f"{operations / 1e12:,.1f} TFLOP" if operations >= 1e12 else f"{operations / 1e9:,.3g} GFLOP"


def seconds(taken: float) -> str:
    """`1.2 s` or `35 ms`."""
    return f"{taken:.3g} s" if taken >= 0.1 else f"{taken * 1e3:.3g} ms"


def _advice(found: Estimate) -> str:
    if found.fits:
        return ""
    if found.evaluation == found.peak:
        return "a smaller per_device_eval_batch_size: what does not fit is the evaluation"
    if found.largest_batch:
        fewer = f"per_device_train_batch_size={found.largest_batch} or less"
        return f"{fewer}, or gradient_checkpointing, or a shorter max_length"
    return "gradient_checkpointing, a shorter max_length, bfloat16 weights (dtype), a smaller model"
