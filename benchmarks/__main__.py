"""Measures the table of docs/benchmarks.md, prints it and keeps it.

    python -m benchmarks [--only F1,F4] [--rounds 20] [--device cuda]

Results go to benchmarks/results/ as markdown, and as JSON with every round.
"""

import argparse
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from . import attaching, beside_peft, compiling, imports, merging, mixed_rows, overhead, training_step, virtual_tokens
from .report import HEAD, Row, machine, markdown
from .setting import LIBRARIES, Setting

ROWS: Mapping[str, Callable[[Setting], list[Row]]] = {
    "F1": training_step.single,
    "F2": training_step.half,
    "F3": training_step.memory,
    "F4": mixed_rows.inference,
    "F5": mixed_rows.training,
    "F6": attaching.adding,
    "F7": attaching.files,
    "F8": attaching.switching,
    "F9": compiling.compiling,
    "F10": overhead.per_site,
    "F11": overhead.latency,
    "F12": virtual_tokens.training,
    "F13": imports.imports,
    "F14": mixed_rows.joint,
    "F15": merging.merge,
    "F16": training_step.methods,
    "F17": beside_peft.methods,
}
RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- measured: made by python -m benchmarks -->\n).*(<!-- /measured -->)", re.DOTALL)


def measured(numbers: Sequence[str], setting: Setting) -> Iterator[tuple[str, list[Row]]]:
    """Each number with its rows; with none where it failed, and then its error is printed."""
    console, begun = Console(stderr=True, highlight=False), time.monotonic()
    for number in numbers:
        try:
            rows = ROWS[number](setting)
        except Exception:
            traceback.print_exc()
            rows = []
        for row in rows:
            line = f"{time.monotonic() - begun:4.0f} s  {number}  {row.what}: coadapt {row.coadapt}, peft {row.peft}"
            console.print(line, soft_wrap=True, markup=False)
        yield number, rows


def about(setting: Setting) -> dict[str, Any]:
    versions = {module.__name__: module.__version__ for module in (*LIBRARIES.values(), torch, transformers)}
    where = {"device": machine(setting.device), "threads": torch.get_num_threads()}
    return {"date": str(date.today()), "versions": versions, **where, "rounds": setting.rounds}


def text(told: Mapping[str, Any], rows: Sequence[Row], command: str) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    head = (
        f"{told['date']}, `{command}`, {versions}, on {told['device']}. Medians of at most {told['rounds']} rounds in "
    )
    head += "which all take turns, and quartiles. Ratios are over the limit or base of the same round."
    wide = [row for row in rows if row.number != "F17"]
    tables = [markdown(HEAD, [row.cells() for row in wide])] if wide else []
    if found := [row for row in rows if row.number == "F17"]:
        tables.append(beside_peft.compact(found))
    return "\n\n".join([head, *tables]) + "\n"


def write(file: Path, told: Mapping[str, Any], rows: Sequence[Row], table: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(f"# Time and memory beside the limit\n\n{table}", "utf-8")
    held = {**told, "rows": [row.as_json() for row in rows]}
    file.with_suffix(".json").write_text(json.dumps(held, indent=1) + "\n", "utf-8")


def publish(table: str) -> None:
    """Puts the table between the marks in docs/benchmarks.md."""
    whole, found = MARKED.subn(lambda marks: f"{marks[1]}{table}{marks[2]}", DOCS.read_text("utf-8"))
    assert found == 1, f"{DOCS} has lost its marks"
    DOCS.write_text(whole, "utf-8")


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda told: told.split(","), help="numbers, such as F1,F4; all if left out")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Such figures mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--publish", action="store_true", help="put the whole table into docs/benchmarks.md")
    given = parser.parse_args(arguments)
    if unknown := [number for number in given.only or () if number not in ROWS]:
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(ROWS)}.")
    if given.rounds < 2 or given.threads < 1:
        parser.error("--rounds are at least 2, which quartiles need, and --threads at least 1.")
    if given.publish and (given.only or given.quick):
        parser.error("--publish is for a whole run, without --only and --quick.")
    return given


def main(arguments: Sequence[str]) -> int:
    given = options(arguments)
    torch.set_num_threads(given.threads)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # peft's, about what it is asked to do here
    setting = Setting(given.device, given.rounds, given.quick)
    told, rows, table = about(setting), list[Row](), ""
    failed: list[str] = []
    for number, found in measured(given.only or list(ROWS), setting):
        rows += found
        failed += [] if found else [number]
        table = text(told, rows, " ".join(["python -m benchmarks", *arguments]))
        write(given.out / "-".join(["performance", told["date"], given.device, *(given.only or ())]), told, rows, table)
    print(table)
    if given.publish and not failed:
        publish(table)
    if failed:
        print(f"Failed, with the errors above: {', '.join(failed)}.", file=sys.stderr)
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
