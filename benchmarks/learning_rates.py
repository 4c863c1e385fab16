"""Which learning rate does each method want? Held-out losses after short trainings on small pretrained models.

    python -m benchmarks.learning_rates --assets FOLDER

prints tables and writes them to benchmarks/results/. FOLDER holds the small models and data that `problems` names; the
task `demo`, on the base that coadapt comes with, needs none of them: `--tasks demo`.
"""

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import coadapt
from coadapt.data.collate import Collator
from coadapt.training.assemble import adapter_config, attach, pad_token, rates
from coadapt.training.options import default_rate, methods
from coadapt.training.run import training_arguments
from coadapt.training.settings import RunConfig
from coadapt.training.trainer import AdapterTrainer

from .report import machine, markdown
from .small_problems import LONGEST, Problem, problems

BATCH, STEPS = 8, 60
SIZES = (1, 3)
"""A grid is these times powers of ten."""
FURTHEST = 8
"""How often the search for a rate goes on while the best is at an end."""
RATIOS = (1, 5, 25, 100)
"""A prompt's rate as a multiple of the LoRA's beside it."""


NEEDED: Mapping[str, Mapping[str, Any]] = {
    "adaption_prompt": {"adapter_layers": 4},
    "bitfit": {"target_modules": "all-linear"},
    "c3a": {"block_size": 32},
    "compacter": {"reduction_factor": 8},
    "full_copy": {"target_modules": "all-linear"},
    "road": {"group_size": 32},
    "shira": {"r": 8},
    "trainable_tokens": {"token_indices": range(200)},
    "vblora": {"vector_length": 32},
    "waveft": {"n_frequency": 1000},
}
"""What methods need to start at all on the smallest bases, which have no biases and narrow layers."""
NOT_HERE = {"xlora": "it mixes adapters that were trained before"}
"""Methods that are not measured, and why."""


def settings(problem: Problem, adapters: Mapping[str, float], seed: int, steps: int) -> RunConfig:
    """A run of those methods (name -> learning rate) with their recommended options."""
    chosen: dict[str, Any] = {
        name: {"method": name, "learning_rate": rate, **NEEDED.get(name, {})} for name, rate in adapters.items()
    }
    if "cpt" in chosen:  # an example is its context
        chosen["cpt"]["cpt_token_ids"] = problem.rows[0][0]["input_ids"]
    return RunConfig(
        model=str(problem.model),
        data=problem.name,
        task=problem.task,
        adapters=chosen,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=steps,
        use_cpu=True,
        seed=seed,
    )


def held_out_loss(problem: Problem, adapters: Mapping[str, float], seed: int, steps: int) -> float:
    """The loss on the held-out examples after `steps` steps (0: the untouched base); infinite if it broke."""
    run = settings(problem, adapters, seed, max(steps, 1))
    torch.manual_seed(seed)
    configs = {name: adapter_config(name, a, problem.task) for name, a in run.adapters.items()}
    view = attach(problem.base(), configs, None)
    train, held_out = problem.rows
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdapterTrainer(
            model=view,
            rates=rates(run, view),
            args=training_arguments(run, Path(folder), evaluates=False),
            train_dataset=train,  # pyright: ignore[reportArgumentType]
            eval_dataset=held_out,  # pyright: ignore[reportArgumentType]
            data_collator=Collator(pad_token_id=pad_token(problem.tokenizer)),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if steps == 0:
            with view.disable_adapter():
                return trainer.evaluate()["eval_loss"]
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    return loss if math.isfinite(loss) else math.inf


def neighbour(rate: float, by: int) -> float:
    """The rate that stands `by` places further in the grid."""
    place = round(math.log10(rate) * len(SIZES)) + by
    return SIZES[place % len(SIZES)] * 10.0 ** (place // len(SIZES))


@dataclass(frozen=True)
class Sweep:
    """Losses of one method on one problem: rate -> loss at seed 0, and those of the best rates again at seed 1."""

    losses: Mapping[float, float]
    again: Mapping[float, float]
    large: float | None = None
    """At the rate for large models, where that was asked for."""

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: self.losses[rate])


def sweep(measure: Callable[[float], float], start: float) -> dict[float, float]:
    """Rate -> loss: uphill from `start`, place by place, until the best stands between two that are worse."""
    first, above = neighbour(start, 0), neighbour(start, 1)
    losses = {first: measure(first), above: measure(above)}
    for _ in range(FURTHEST):
        best = min(losses, key=lambda rate: losses[rate])
        if min(losses) < best < max(losses):
            break
        rate = neighbour(best, 1 if best == max(losses) else -1)
        losses[rate] = measure(rate)
    return dict(sorted(losses.items()))


Mix = Mapping[tuple[float, int], tuple[float, float]]
"""(the LoRA's rate, the prompt's as a multiple of it) -> losses at two seeds"""


def mixes(problem: Problem, best_lora: float, steps: int) -> Mix:
    """prompt + lora, the LoRA at its rate for large models and at its best one here."""
    return {
        (rate, ratio): tuple(
            held_out_loss(problem, {"prompt_tuning": rate * ratio, "lora": rate}, seed, steps) for seed in (0, 1)
        )
        for rate in (default_rate("lora")[0], best_lora)
        for ratio in RATIOS
    }  # pyright: ignore[reportReturnType]


def report_sweeps(problem: Problem, start: float, found: Mapping[str, Sweep]) -> str:
    """One row for each method, one column for each rate; two seeds where there are two."""
    every = sorted({rate for s in found.values() for rate in s.losses})

    def cell(s: Sweep, rate: float) -> str:
        texts = [f"{losses[rate]:.3f}" for losses in (s.losses, s.again) if rate in losses]
        return f"**{' / '.join(texts)}**" if rate == s.best else " / ".join(texts)

    parameters = sum(p.numel() for p in problem.base().parameters())
    head = ["method", *(f"{rate:.0e}" for rate in every)]
    body = [[name, *(cell(s, rate) for rate in every)] for name, s in found.items()]
    title = f"## {problem.name}: {problem.model.name}, {parameters:,} parameters, {problem.task}"
    what = " ".join((problem.make.__doc__ or "").split())
    return f"{title}\n\n{what} Held-out loss before training: {start:.3f}.\n\n{markdown(head, body)}\n"


def report_mix(found: Mix) -> str:
    """One row for each rate of the LoRA, one column for each ratio."""
    body = [
        [f"{rate:.0e}", *(" / ".join(f"{loss:.3f}" for loss in found[rate, ratio]) for ratio in RATIOS)]
        for rate in sorted({rate for rate, _ in found})
    ]
    head = ["the LoRA's rate", *(f"prompt: {ratio} times it" for ratio in RATIOS)]
    return f"prompt + lora, both trained together; losses at two seeds:\n\n{markdown(head, body)}\n"


Found = Mapping[str, tuple[float, Mapping[str, Sweep]]]
"""Problem -> (loss before training, method -> its sweep)"""


def report_overall(found: Found) -> str:
    """One row for each method: for each rate that every problem tried, the share of the gain that it misses.

    The gain of a method on a problem is from the loss before training to its best one; shares are means over problems.
    Bold is the smallest rate that misses at most a tenth: longer trainings want smaller rates.
    """
    body: list[list[str]] = []
    for method in next(iter(found.values()))[1]:
        pairs = [(start, sweeps[method]) for start, sweeps in found.values() if method in sweeps]
        tried = sorted(set.intersection(*({*s.losses} for _, s in pairs)))
        missed = {rate: sum(_missed(start, s, s.losses[rate]) for start, s in pairs) / len(pairs) for rate in tried}
        shown = {rate: f"{rate:.0e}: {share:.0%}" for rate, share in missed.items()}
        if chosen := [rate for rate, share in missed.items() if round(share, 2) <= 0.1]:
            shown[chosen[0]] = f"**{shown[chosen[0]]}**"
        best = ", ".join(f"{s.losses[s.best]:.3f} ({s.best:.0e})" for _, s in pairs)
        large = [_missed(start, s, s.large) for start, s in pairs if s.large is not None]
        at_large = f"{default_rate(method)[0]:g}: {sum(large) / len(large):.0%}" if large else ""
        body.append([method, best, ", ".join(shown.values()), at_large])
    head = ["method", "best losses", "share of the gain that a rate misses", "the rate for large models misses"]
    before = ", ".join(f"{start:.3f}" for start, _ in found.values())
    return f"## Over {', '.join(found)}: {before} before training\n\n{markdown(head, body)}\n"


def _missed(start: float, sweep: Sweep, loss: float) -> float:
    """At most all of it, as a rate at which training breaks is no worse than useless."""
    best = sweep.losses[sweep.best]
    return min((loss - best) / (start - best), 1.0) if best < start else 1.0


@dataclass(frozen=True)
class Measured:
    """Losses that are known, kept in a file as they come."""

    file: Path
    steps: int
    losses: dict[str, float]

    def __call__(self, problem: Problem, method: str, rate: float, seed: int) -> float:
        name = f"{problem.name} {method} {rate:g} {seed}"
        if name not in self.losses:
            self.losses[name] = held_out_loss(problem, {method: rate}, seed, self.steps)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.losses, indent=1) + "\n", "utf-8")
        return self.losses[name]


def arguments() -> argparse.Namespace:
    every = [name for name in methods() if name not in NOT_HERE]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--assets", type=Path, help="folder with weights/ and data/; without it, only the demo's base")
    parser.add_argument("--tasks", nargs="+", help="of shakespeare, demo, instructions, letters; all, if left out")
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of each training")
    parser.add_argument("--large", action="store_true", help="measure the rates for large models, too")
    parser.add_argument("--again", type=int, default=1, help="how many of the best rates are tried with another seed")
    parser.add_argument("--resume", action="store_true", help="take the losses that today's file has already")
    parser.add_argument("--mix", action="store_true", help="train prompt + lora together, too; it needs both of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    known = problems(given.assets)
    tasks = given.tasks or list(known)
    if unknown := sorted(set(tasks) - set(known)):
        raise SystemExit(f"--tasks {' '.join(unknown)}: there are {', '.join(known)}; all but demo need --assets.")
    if given.mix and not {"lora", "prompt_tuning"} <= {*given.methods}:
        raise SystemExit("--mix is about lora and prompt_tuning: name both of them in --methods.")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # each run of the Trainer collects garbage, for which all that is imported would be looked through
    longer = "" if given.steps == STEPS else f"{given.steps}-steps-"
    file = given.out / f"learning_rates-{longer}{date.today()}.json"
    done = json.loads(file.read_text("utf-8")) if given.resume and file.exists() else {}
    measure, begun = Measured(file, given.steps, done), time.monotonic()
    overall: dict[str, tuple[float, dict[str, Sweep]]] = {
        name: (held_out_loss(known[name], {"lora": 1.0}, 0, 0), {}) for name in tasks
    }
    best: dict[str, float] = {}
    for name, (_, found) in overall.items():
        for method in given.methods:
            loss = partial(measure, known[name], method)
            found[method] = Sweep(sweep(partial(loss, seed=0), best.get(method) or default_rate(method, 0)[0]), {})
            best[method] = found[method].best
            tell(begun, name, method, found[method])
        write(given, known, overall, [], begun)
    for name, (_, found) in overall.items():
        for method, one in found.items():
            loss, rates = partial(measure, known[name], method), sorted(one.losses, key=lambda rate: one.losses[rate])
            again = {rate: loss(rate, 1) for rate in sorted(rates[: given.again])}
            found[method] = replace(one, again=again, large=loss(default_rate(method)[0], 0) if given.large else None)
        write(given, known, overall, [], begun)
    causal = [name for name in tasks if given.mix and known[name].task == "causal-lm"]
    mixed = [report_mix(mixes(known[name], overall[name][1]["lora"].best, given.steps)) for name in causal]
    print(write(given, known, overall, mixed, begun))


def tell(begun: float, name: str, method: str, found: Sweep) -> None:
    shown = ", ".join(f"{rate:.0e}: {loss:.3f}" for rate, loss in found.losses.items())
    Console(stderr=True, highlight=False).print(
        f"{time.monotonic() - begun:5.0f} s  {name} {method}  {shown}", soft_wrap=True
    )


def write(
    given: argparse.Namespace, known: Mapping[str, Problem], overall: Found, mixed: Sequence[str], begun: float
) -> str:
    """Keeps what there is so far."""
    command = " ".join(["python -m benchmarks.learning_rates", *_shown(sys.argv[1:])])
    needed = "; ".join(
        f"{name} {', '.join(f'{k}={v}' for k, v in options.items())}" for name, options in NEEDED.items()
    )
    about = (
        f"# Learning rates on small pretrained models, {date.today()}\n\n`{command}` with coadapt "
        f"{coadapt.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, on {machine()}. "
        f"{given.steps} steps of {BATCH} examples of at most {LONGEST} tokens, seed 0 (and 1 where there is a second "
        "figure), AdamW, linear schedule with 3 % warm-up, gradients clipped at 1; methods with their recommended "
        f"options, and {needed}. Losses are held-out, in nats per token; bold is the best of a row.\n"
    )
    overall = {name: found for name, found in overall.items() if found[1]}
    parts = [report_sweeps(known[name], *found) for name, found in overall.items()]
    took = f"{(time.monotonic() - begun) / 60:.0f} minutes."
    text = "\n".join([about, report_overall(overall), *parts, *mixed, took])
    given.out.mkdir(parents=True, exist_ok=True)
    longer = "" if given.steps == STEPS else f"{given.steps}-steps-"
    (given.out / f"learning_rates-{longer}{date.today()}.md").write_text(text + "\n", "utf-8")
    return text


def _shown(arguments: Sequence[str]) -> list[str]:
    """The command line without this machine's folders."""
    hidden = {"--assets": "FOLDER", "--out": "FOLDER"}
    return [hidden.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]


if __name__ == "__main__":
    main()
