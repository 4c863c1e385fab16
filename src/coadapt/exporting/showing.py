"""What a person is told of an export."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .model_forms import ONNX_INPUTS

if TYPE_CHECKING:
    from ..combining import Report
    from . import Exported


def _made(report: "Report") -> str:
    rows = [row for row in report.rows if row.rank is not None]
    rank = max((row.rank or 0 for row in rows), default=0)
    what = f"One LoRA of rank {rank} at {len(rows)} layers" if rows else f"One adapter at {len(report.rows)} places"
    if report.exact:
        return f"{what}, exact."
    return f"{what}, the nearest to the change of each weight; {100 * (report.lost or 0):.3g} % of it is lost."


def lines(done: "Exported") -> Iterator[str]:
    """One after the other."""
    if done.report is not None:
        yield _made(done.report)
    elif not done.merged:
        yield "Written as it is: the program takes adapters of this kind."
    if done.drift is not None:
        how = {True: "Merged", False: "Loaded again"}[done.merged]
        how = "Run by onnxruntime" if done.target == "onnx" else how
        yield f"{how}: {done.drift}."
    yield from done.notes
    for name, title in (("onnx", "float32"), ("int8", "int8")):
        if name in done.facts:
            size, seconds = done.facts[name]["bytes"], done.facts[name]["seconds_per_call"]
            yield f"{title}: {size / 1e6:.2f} MB, {1000 * seconds:.2f} ms for {ONNX_INPUTS} on this CPU."
    for kind in ("int8", "q8_0"):
        if (off := done.facts.get(f"{kind}_drift")) is not None:
            yield f"{kind}: {off}."
    total = sum(done.files.values())
    kind = "Merged model" if done.merged else "Adapter"
    yield f"{kind} for {done.target} written to {done.out} ({total / 1e6:.1f} MB). Use it with:"
    yield f"  {done.use}"
