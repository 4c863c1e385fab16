"""The rows of a comparison in three parts, as files that every training reads: to train on, to choose by, to score."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from coadapt.data.prepare import plan
from coadapt.data.source import Source, fingerprint, read
from coadapt.formats.files import aside
from coadapt.training.datasets import DatasetSettings
from coadapt.training.material import columns
from coadapt.training.settings import RunConfig

PARTS = ("train", "validation", "held-out")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of a comparison, part by part."""

    source: Source
    settings: DatasetSettings
    task: str | None
    parts: Mapping[str, Dataset]
    fingerprint: str
    """SHA-256 of the rows that were read."""

    def write(self, folder: Path) -> dict[str, Path]:
        """Part -> its file in `folder`, written if they are not all there."""
        ending = "txt" if self.source.document else "parquet"
        files = {name: folder / f"{name}.{ending}" for name in PARTS}
        if all(file.is_file() for file in files.values()):
            return files
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            with aside(file) as part:
                if self.source.document:
                    part.write_text("\n".join(self.parts[name]["text"]), "utf-8")
                else:
                    _with_paths(self.parts[name], self.source, self.settings, self.task).to_parquet(str(part))
        return files


def split(run: RunConfig, validation: float) -> Split:
    """The rows that a run reads, in three parts. Which row is where depends on `run.seed` alone.

    Held out is what the data holds out itself, or `eval_data`, or a share of all rows; of the rest the share
    `validation` is to choose by. A long text is cut in this order, so that no part is known from its neighbours.

    Raises:
        ValueError: the data cannot be read, or has too few rows for three parts.
    """
    settings = run.sources["data"]
    source = read(settings.data, settings.dataset_config)
    given = read(settings.eval_data, settings.dataset_config).rows if settings.eval_data else source.held_out
    return Split(
        source=source,
        settings=settings,
        task=run.task,
        parts=(_pieces if source.document else _rows)(run, source, given, validation),
        fingerprint="-".join(fingerprint(rows) for rows in (source.rows, given) if rows is not None),
    )


def _rows(run: RunConfig, source: Source, given: Dataset | None, validation: float) -> dict[str, Dataset]:
    rows = source.rows
    least = 2 if given is not None else 3
    if len(rows) < least:
        raise ValueError(
            f"data={run.data!r} has {len(rows)} rows to train on, too few for the parts {', '.join(PARTS)}."
        )
    if given is None:
        if not run.eval_split:
            raise ValueError("eval_split=0 holds out no rows, and a comparison needs some to score: give eval_data.")
        rows, given = _split(rows, run.eval_split, run.seed, leave=2)
    train, chosen = _split(rows, validation, run.seed, leave=1)
    return dict(zip(PARTS, (train, chosen, given), strict=True))


def _split(rows: Dataset, share: float, seed: int, leave: int) -> tuple[Dataset, Dataset]:
    count = min(max(1, round(len(rows) * share)), len(rows) - leave)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _pieces(run: RunConfig, source: Source, given: Dataset | None, validation: float) -> dict[str, Dataset]:
    """A text by its lines, the end last."""
    lines = "\n".join(source.rows["text"]).splitlines()
    if given is None and not run.eval_split:
        raise ValueError("eval_split=0 holds out no text, and a comparison needs some to score: give eval_data.")
    end = len(lines) if given is not None else round(len(lines) * (1 - run.eval_split))
    middle = round(end * (1 - validation))
    if not 0 < middle < end or (given is None and end == len(lines)):
        raise ValueError(f"data={run.data!r} has {len(lines)} lines, too few for the parts {', '.join(PARTS)}.")
    texts = [lines[:middle], lines[middle:end], lines[end:] if given is None else given["text"]]
    return {name: Dataset.from_dict({"text": ["\n".join(text)]}) for name, text in zip(PARTS, texts, strict=True)}


def _with_paths(rows: Dataset, source: Source, settings: DatasetSettings, task: str | None) -> Dataset:
    """Files that rows name, relative to where the rows were read, by their whole paths."""
    form = plan(source, None, columns(settings), task).form
    if form.kind != "pictured":
        return rows
    column, root = form.columns["image"], source.root.resolve()

    def whole(row: Mapping[str, Any]) -> dict[str, str]:
        return {column: str(root / row[column])}

    return rows.map(whole, load_from_cache_file=False, keep_in_memory=True)
