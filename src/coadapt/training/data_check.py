"""`coadapt data check`: the data of a run as the run would read it, looked at row by row."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from coadapt.data.check import Finding, Lengths, Looked, Split, findings, look
from coadapt.data.images import opened
from coadapt.data.prepare import Plan, encoder, split_rows
from coadapt.data.segments import find_framing
from coadapt.data.show import CLOSE, OPEN, one_cells, one_sample
from coadapt.training.assemble import check_sight, load_config, load_processor, longest, positions
from coadapt.training.datasets import DatasetSettings
from coadapt.training.material import read_rows, recognised
from coadapt.training.settings import RunConfig, Task
from coadapt.training.timetable import timetable


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What was found of one data set."""

    name: str
    data: str
    task: Task
    format: str
    columns: dict[str, str]
    """Role -> column."""
    notes: tuple[str, ...]
    """How it was read."""
    document: bool
    """One long text, which is cut into blocks of max_length; the last of them are held out."""
    max_length: int | None
    splits: tuple[Split, ...]
    findings: tuple[Finding, ...]
    sample: Text
    """One row, what is trained on between ⟦ and ⟧."""

    @property
    def fine(self) -> bool:
        """Whether nothing was found that should be changed."""
        return not self.findings

    def plain(self) -> dict[str, Any]:
        """All of it as plain values."""
        values = {**{k: v for k, v in vars(self).items() if k not in ("splits", "findings")}, "fine": self.fine}
        values["sample"] = self.sample.plain
        return values | {"splits": [asdict(s) for s in self.splits], "findings": [asdict(f) for f in self.findings]}


def check_data(run: RunConfig) -> list[DataCheck]:
    """Each data set of a run, held against its model's tokenizer; without a model, by characters.

    Raises:
        ValueError: it cannot be read, or is of no known format, or goes with the model no more than in training.
    """
    config = load_config(run.model, run.revision) if run.model else None
    if not run.model and any(one.max_length is not None for one in run.sources.values()):
        raise ValueError("max_length counts tokens: give the model whose tokenizer makes them.")
    return [_check(run, config, name, settings) for name, settings in run.sources.items()]


def _check(run: RunConfig, config: PreTrainedConfig | None, name: str, settings: DatasetSettings) -> DataCheck:
    task, found = recognised(run, config, settings, *read_rows(settings))
    split = run.eval_split if settings.eval_split is None else settings.eval_split
    rows, held_rows = split_rows(found, split, run.seed)
    processor, encode, limit, max_length = None, None, None, None
    if config is not None:
        check_sight(run.model, config, task)
        processor = load_processor(run.model, task, run.revision)
    if config is not None and isinstance(processor, PreTrainedTokenizerBase):
        uses = [run.adapters[adapter] for adapter in timetable(run).uses(name)]
        max_length = longest(settings.max_length, uses, config, processor)
        limit = longest(min(positions(config, processor), default=None), uses, config, processor)
        separator = run.prompt_separator if settings.prompt_separator is None else settings.prompt_separator
        framing = find_framing(found.form, found.features, processor, separator)
        encode = encoder(found, processor, task, framing, max_length, settings.completion_only_loss is not False)
    unknown = cast(int | None, getattr(processor, "unk_token_id", None))  # an image processor has none
    train = look(rows, found, "train", encode, unknown, _content(found, found.source.root))
    held_out = None
    if held_rows is not None:
        root = found.source.root if found.held_out is None else found.held_out.root
        held_out = look(held_rows, found, "held out", encode, unknown, _content(found, root))
    looked = [part for part in (train, held_out) if part is not None]
    unit = "tokens" if encode is not None else "characters"
    return DataCheck(
        name=name,
        data=found.source.name,
        task=task,
        format=found.form.name,
        columns=dict(found.form.columns),
        notes=(*found.source.notes, *([found.form.note] if found.form.note else [])),
        document=found.source.document,
        max_length=max_length,
        splits=tuple(part.split(unit) for part in looked),
        findings=tuple(findings(train, held_out, max_length, limit)),
        sample=_sample(train, found, processor),
    )


def _content(found: Plan, root: Path) -> Callable[[Any], str] | None:
    """Path of an image -> a digest of its file; "" where it is none. None: the rows are no images."""
    if found.form.kind != "pictured":
        return None

    def digest(path: Any) -> str:
        try:
            opened(root / str(path))
        except (ValueError, OSError):
            return ""
        return hashlib.sha256((root / str(path)).read_bytes()).hexdigest()

    return digest


def _sample(train: Looked, found: Plan, processor: Any) -> Text:
    if train.sample is not None:
        return one_sample(train.sample, processor, found.classes)
    return Text("no row has anything to train on") if train.first is None else one_cells(train.first, found.form)


# ---- as a person reads it --------------------------------------------------------------------------------------------


def tables(check: DataCheck) -> Iterator[RenderableType]:
    """What the data is; what is wrong with it, and what to do; one row."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    roles = ", ".join(c if role == c else f"{c} → {role}" for role, c in check.columns.items())
    table.add_row("data", Text(check.data))
    table.add_row("format", Text(f"{check.format} ({roles}), for {check.task}"))
    for split in check.splits:
        one = "text" if check.document else "row"
        table.add_row(split.name, f"{split.rows:,} {one}{'s' * (split.rows != 1)}{_lengths(split.lengths)}")
    if check.max_length is not None:
        table.add_row("max_length", str(check.max_length))
    if classes := check.splits[0].classes:
        table.add_row("classes", Text(", ".join(f"{name} {count:,}" for name, count in sorted(classes.items()))))
    for note in check.notes:
        table.add_row("note", Text(note))
    yield table
    yield Text("\none row, what is trained on between ⟦ and ⟧:".replace("⟦", OPEN).replace("⟧", CLOSE), "dim")
    yield check.sample
    yield Text()
    if check.fine:
        yield Text("Nothing was found that should be changed.", "green")
        return
    many = len(check.findings)
    yield Text(f"{many} thing{'s' * (many > 1)} to change, or to know:", "bold")
    for finding in check.findings:
        named = ", ".join(map(str, finding.rows)) + (", …" if finding.count > len(finding.rows) else "")
        where = f" (row {named}, counted from 0)" if finding.rows else ""
        yield Text.assemble(("! ", "yellow"), (finding.what, "bold"), f", {finding.split}: {finding.said}{where}")
        yield Text(f"  → {finding.mend}", "dim")


def _lengths(found: Lengths | None) -> str:
    if found is None:
        return ""
    if found.least == found.most:
        return f" of {found.most:,} {found.unit}"
    return (
        f" of {found.least:,} to {found.most:,} {found.unit}, half of them up to {found.median:,}, "
        f"95 % up to {found.p95:,}"
    )
