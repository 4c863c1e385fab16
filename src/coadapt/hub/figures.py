"""The numbers of a card: scores, how the training went, sizes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from coadapt.hub.story import Story

SHARES = ("exact_match", "accuracy", "rouge1", "rouge2", "rougeL")
"""Metrics that are shares: shown in per cent."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def number(value: float) -> str:
    """Four digits."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


# ---- scores ----------------------------------------------------------------------------------------------------------


def scores(story: Story) -> Iterator[str]:
    """What `coadapt eval` measured: a table a metric, the base first. Or that nothing was measured."""
    results: Sequence[Mapping[str, Any]] = story.evaluation.get("results") or ()
    if not results:
        yield "Not measured. (`coadapt eval --adapter DIR` measures base and adapters side by side.)"
        return
    data = story.evaluation.get("data") or {}
    tasks = (story.evaluation.get("lm_eval") or {}).get("tasks")
    rows = f"{data['rows']:,} rows of `{data['name']}`" if data else f"lm_eval: {', '.join(tasks or ())}"
    level = round(100 * story.evaluation.get("level", 0.95))
    yield f"On {rows}, measured by `coadapt eval`; in brackets the interval of {level} %."
    yield from (f"- **{said}**" for said in data.get("told") or () if "THESE ARE" in said)
    names = list(results[0]["scores"])
    yield table(
        ["", *(f"{name.replace('_', ' ')}{' in %' if name in SHARES else ''}" for name in names)],
        ([_who(one), *(_score(one, name) for name in names)] for one in results),
    )


def _who(result: Mapping[str, Any]) -> str:
    return "the base" if result["composition"] is None else f"`{result['composition']}`"


def _score(result: Mapping[str, Any], name: str) -> str:
    found = result["scores"][name]
    factor = 100 if name in SHARES else 1
    mean, low, high = (number(factor * found[key]) for key in ("mean", "low", "high"))
    verdict = (result.get("against_base") or {}).get(name, {}).get("verdict")
    said = {"better": ", better", "worse": ", **worse**", "within the spread": ", no difference shown"}
    return f"{mean} ({low} to {high}){said.get(str(verdict), '')}"


def of_what_was_saved(story: Story) -> Mapping[str, float]:
    """Metric -> the score of the composition that the folder holds; none where that was not measured."""
    saved = story.contents.composition
    for result in story.evaluation.get("results") or ():
        if result["composition"] == saved:
            return {name: found["mean"] for name, found in result["scores"].items()}
    return {}


# ---- training --------------------------------------------------------------------------------------------------------


def training(story: Story) -> Iterator[tuple[str, str]]:
    """What is recorded of the run: data, length, seeds, machine, time, memory."""
    for name, data in story.data.items():
        said = f"`{data['name']}` ({data.get('format', 'unknown format')})"
        yield ("data" if len(story.data) == 1 else f"data `{name}`"), said
        if data.get("sha256"):
            yield "SHA-256 of its rows", f"`{data['sha256']}`"
    recorded: Mapping[str, Any] = story.provenance.get("figures") or {}
    yield from ((name, str(value)) for name, value in recorded.items())
    for name in ("num_train_epochs", "max_steps", "seed", "dtype"):
        if name in story.run or (name == "seed" and story.run):
            yield name, str(story.run.get(name, 42))
    hardware = story.provenance.get("hardware") or {}
    if hardware:
        device = ", ".join(hardware.get("gpus") or ()) or f"CPU ({hardware.get('threads')} threads)"
        yield "device", f"{device}, {hardware.get('machine')}, {hardware.get('system')}"
    if seconds := run_time(story.log):
        yield "time", f"{seconds:,.0f} s" if seconds < 7200 else f"{seconds / 3600:.1f} h"
    if peaks := [line["train/peak_memory_gib"] for line in story.log if "train/peak_memory_gib" in line]:
        yield "peak of memory", f"{max(peaks):.2f} GiB"


def run_time(log: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of training: the log counts from the start, and from 0 again where the run was resumed."""
    total = last = 0.0
    for line in log:
        now = float(line.get("train/runtime", last))
        total += last if now < last else 0.0
        last = now
    return total + last
