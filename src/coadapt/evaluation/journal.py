"""What was already asked, kept on the disk batch by batch: an evaluation that is cut off goes on where it was."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coadapt.evaluation.metrics import Response


def digest(*facts: Any) -> str:
    """A short name for everything that responses depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Journal:
    """Responses by composition and row, in a file beside the one that they are for.

    A context: on a clean end `remove` it; left standing, the next one of the same question takes it up.

    Args:
        file: what all this is for.
        question: what `digest` made of what is asked; another question has another journal.
    """

    def __init__(self, file: Path, question: str) -> None:
        self.file = file.with_name(f".{file.name}.{question}.part")
        self.known: dict[str, dict[int, Response]] = {}
        self.columns: dict[str, dict[str, Any]] = {}
        """What somebody else's evaluation found, by composition."""

    def __enter__(self) -> Self:
        whole = 0
        if self.file.is_file():
            for line in self.file.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or not self._take(line):
                    break  # cut off by whatever ended the process
                whole += len(line)
            os.truncate(self.file, whole)
        self._lines = self.file.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lines.close()
        if self.file.is_file() and not self.file.stat().st_size:
            self.file.unlink()

    def _take(self, line: bytes) -> bool:
        try:
            said = json.loads(line)
            if "columns" in said:
                self.columns[said["who"]] = said["columns"]
                return True
            rows = {int(row): Response(**values) for row, values in said["rows"].items()}
        except (ValueError, TypeError, KeyError):
            return False
        self.known.setdefault(said["who"], {}).update(rows)
        return True

    def write(self, who: str, rows: Mapping[int, Response]) -> None:
        """Keeps the responses of a batch."""
        self._add({"who": who, "rows": {row: vars(response) for row, response in rows.items()}})
        self.known.setdefault(who, {}).update(rows)

    def write_columns(self, who: str, columns: dict[str, Any]) -> None:
        """Keeps what somebody else's evaluation found of a composition."""
        self._add({"who": who, "columns": columns})
        self.columns[who] = columns

    def _add(self, line: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._lines.flush()

    @property
    def count(self) -> int:
        """Responses, and whole compositions, that are kept."""
        return sum(map(len, self.known.values())) + len(self.columns)

    def remove(self) -> None:
        """What it was kept for is written."""
        self._lines.close()
        self.file.unlink(missing_ok=True)
