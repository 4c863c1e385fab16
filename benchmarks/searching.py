"""What `coadapt search` finds by learning from its trials, beside a random search with as many.

    python -m benchmarks.searching --assets FOLDER [--trials 16] [--steps 20] [--seeds 3]

Nothing is given up before its end, so both make as many steps. The figures are the best validation loss after so many
trials, and the held-out loss of the best candidate, trained once more with another seed.
"""

import argparse
import csv
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import optuna
import torch
import transformers
from optuna.trial import TrialState
from rich.console import Console

import coadapt
from coadapt.cli.output import quiet
from coadapt.tuning.findings import held_out
from coadapt.tuning.search import search
from coadapt.tuning.space import SearchConfig

from .report import machine, markdown

ROWS = 400
METHODS = "lora,prompt,bottleneck,ia3"
SAMPLERS = ("tpe", "random")
CHECKPOINTS = (4, 8, 12, 16, 24, 32)
"""After so many trials the best one is told."""


def snips(assets: Path) -> list[dict[str, str]]:
    """What somebody says to an assistant -> which of 7 things is wanted."""
    rows: list[dict[str, str]] = []
    for file in sorted((assets / "data" / "snips").glob("train_*.json")):
        name = file.stem.removeprefix("train_")
        for one in json.loads(file.read_text("latin-1"))[name]:
            rows.append({"text": "".join(part["text"] for part in one["data"]).strip(), "label": name})
    return rows


def e2e_nlg(assets: Path) -> list[dict[str, str]]:
    """Facts about a restaurant -> a sentence that says them."""
    with (assets / "data" / "e2e_nlg" / "devset.csv").open(encoding="utf-8", newline="") as file:
        return [{"prompt": row["mr"], "completion": f" {row['ref']}"} for row in csv.DictReader(file)]


TASKS = {"snips": snips, "e2e_nlg": e2e_nlg}


def one(assets: Path, data: Path, sampler: str, seed: int, given: argparse.Namespace, out: Path) -> Mapping[str, float]:
    """The best validation loss after so many trials, and the best one's held-out loss."""
    config = SearchConfig.read(
        {
            "model": str(assets / "weights" / "stories260K-hf"),
            "data": str(data),
            "methods": METHODS,
            "budget": str(given.steps),
            "trials": given.trials,
            "sampler": sampler,
            "prune": False,
            "objectives": "loss",
            "seed": seed,
            "validation_split": 0.25,
            "max_length": 96,
            "use_cpu": True,
            "verify": False,
            "eval_strategy": "no",
            "save_strategy": "no",
            "out": out,
        }
    )
    found = search(config, Console(quiet=True))
    values = [t.values[0] for t in sorted(found.trials(TrialState.COMPLETE), key=lambda t: t.number)]
    best = {str(n): min(values[:n]) for n in CHECKPOINTS if n <= len(values)}
    score = held_out(found)
    return {**best, "held out": float("nan") if score is None else score.mean}


def table(found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One row for each sampler: means over seeds, and each seed's figure."""
    columns = list(next(iter(found.values()))[0])

    def cell(runs: Sequence[Mapping[str, float]], column: str) -> str:
        values = [run[column] for run in runs]
        return f"{statistics.fmean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"

    head = ["search", *(c if c == "held out" else f"after {c} trials" for c in columns)]
    return markdown(head, [[name, *(cell(runs, c) for c in columns)] for name, runs in found.items()])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with weights/ and data/")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet()
    begun, parts = time.monotonic(), list[str]()
    for name, read in TASKS.items():
        found: dict[str, list[Mapping[str, float]]] = {sampler: [] for sampler in SAMPLERS}
        for seed in range(given.seeds):
            rows = read(given.assets)
            random.Random(seed).shuffle(rows)
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "rows.jsonl"
                data.write_text("".join(json.dumps(row) + "\n" for row in rows[:ROWS]), "utf-8")
                for sampler in SAMPLERS:
                    found[sampler].append(one(given.assets, data, sampler, seed, given, Path(folder) / sampler))
                    print(
                        f"{time.monotonic() - begun:5.0f} s  {name} {sampler} {seed}: {found[sampler][-1]}", flush=True
                    )
        parts.append(f"## {name}\n\n{' '.join((read.__doc__ or '').split())} Losses, mean of seeds (each):\n")
        parts.append(table(found) + "\n")
    pairs = zip(["", *arguments], arguments, strict=False)
    shown = " ".join("FOLDER" if before in ("--assets", "--out") else word for before, word in pairs)
    versions = f"optuna {optuna.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    head = (
        f"# A search that learns, beside a random one, {date.today()}\n\n"
        f"`python -m benchmarks.searching {shown}` with coadapt {coadapt.__version__}, {versions}, "
        f"on {machine()}. "
        f"stories260K, {ROWS} rows (a fifth held out, of the rest a quarter to choose by), {METHODS} in mixes "
        f"of up to two, {given.steps} steps of 8 rows for each candidate, {given.trials} candidates, "
        f"{given.seeds} seeds of data and search.\n"
    )
    text = "\n".join([head, *parts, f"{(time.monotonic() - begun) / 60:.0f} minutes."])
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"searching-{date.today()}.md").write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
