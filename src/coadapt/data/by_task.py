"""Which task each row is of, for adapters and routers that tell tasks apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset

from coadapt.config import did_you_mean

TASK = "task_ids"
"""The key of an example that says its task, and the column that does so where none is named."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Of the rows of one data set."""

    column: str | None = None
    """Says each row's task; None: all of them are of the task `number`."""
    number: int = 0
    names: tuple[str, ...] = ()
    """Of all tasks, by number; none where the column holds numbers."""
    count: int
    """How many tasks there are, in all data sets together."""

    def of(self, row: Mapping[str, Any]) -> int:
        """The number of a row's task.

        Raises:
            ValueError: it is none of those that are known.
        """
        if self.column is None:
            return self.number
        return number_of(row[self.column], self.names, self.count, f"The column {self.column!r}")

    def __str__(self) -> str:
        return f"{self.count} tasks" + (f": {', '.join(self.names)}" if self.names else "")


def number_of(task: Any, names: Sequence[str], count: int | None, where: str) -> int:
    """The number of a task that is told by its name or its number; `where` begins the error message.

    Raises:
        ValueError: there is none of that name or number.
    """
    if names and str(task) in names:
        return names.index(str(task))
    if not names and str(task).isdigit() and (count is None or int(task) < count):
        return int(task)
    known = ", ".join(names) if names else "whole numbers from 0" + ("" if count is None else f" to {count - 1}")
    raise ValueError(f"{where} says the task {task!r}.{did_you_mean(str(task), names)} Known: {known}.")


def by_task(sets: Mapping[str, Dataset], told: Mapping[str, str | None]) -> dict[str, Tasks]:
    """The tasks of data sets; empty where nothing says which rows are of which.

    By a column of numbers from 0 or of names, the one that is `told`, or else one called `task_ids`; where none of
    several data sets has one, each of them is a task.

    Raises:
        ValueError: a column is not there, or holds what is no task.
    """
    columns = {name: _column(name, rows, told[name]) for name, rows in sets.items()}
    if not any(columns.values()):
        names = tuple(sets)
        return {name: Tasks(number=i, names=names, count=len(names)) for i, name in enumerate(names) if len(names) > 1}
    if without := [name for name, column in columns.items() if column is None]:
        others = ", ".join(name for name in columns if name not in without)
        raise ValueError(f"{without[0]}: no column says which task a row is of, as in {others}: name it (task_column).")
    values = {name: rows.unique(cast(str, columns[name])) for name, rows in sets.items()}
    every = [value for found in values.values() for value in found]
    if any(value is None or value == "" for value in every):
        raise ValueError("A row says no task: fill the column, or leave such rows out.")
    if all(isinstance(value, str) for value in every):
        names = tuple(sorted(set(every)))
        return {name: Tasks(column=column, names=names, count=len(names)) for name, column in columns.items()}
    if wrong := [v for v in every if isinstance(v, bool) or not isinstance(v, int) or v < 0]:
        raise ValueError(f"Tasks are names, or whole numbers from 0; {wrong[0]!r} is neither.")
    return {name: Tasks(column=column, count=max(every) + 1) for name, column in columns.items()}


def _column(name: str, rows: Dataset, told: str | None) -> str | None:
    if told is not None and told not in rows.column_names:
        raise ValueError(
            f"{name}: there is no column {told!r} (task_column); there are {', '.join(rows.column_names)}."
        )
    return told or (TASK if TASK in rows.column_names else None)
