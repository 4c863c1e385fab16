"""Which learning rate does each method want? Held-out losses after short trainings on small pretrained models.

    python -m benchmarks.learning_rates --assets FOLDER

prints tables and writes them to benchmarks/results/. FOLDER holds the small models and data that `problems` names; the
task `demo`, on the base that coadapt comes with, needs none of them: `--tasks demo`.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import coadapt
from coadapt.data.collate import Collator
from coadapt.training.assemble import adapter_config, attach, pad_token, rates
from coadapt.training.options import RECOMMENDED, default_rate
from coadapt.training.run import training_arguments
from coadapt.training.settings import RunConfig
from coadapt.training.trainer import AdapterTrainer

from .report import machine, markdown
from .small_problems import LONGEST, Problem, problems

BATCH, STEPS = 8, 60
SIZES = (1, 3)
"""A grid is these times powers of ten."""
RATIOS = (1, 5, 25, 100)
"""A prompt's rate as a multiple of the LoRA's beside it."""


def settings(problem: Problem, adapters: Mapping[str, float], seed: int, steps: int) -> RunConfig:
    """A run of those methods (name -> learning rate) with their recommended options, on all linear layers."""
    chosen: dict[str, Any] = {name: {"method": name, "learning_rate": rate} for name, rate in adapters.items()}
    # The Llamas have no biases, and a full copy needs its modules named: both get all linear layers.
    for name in {"bitfit", "full_copy"} & set(chosen):
        chosen[name]["target_modules"] = "all-linear"
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
    """Losses of one method on one problem: rate -> loss at seed 0, and the best rate's again at seed 1."""

    losses: Mapping[float, float]
    large: float
    again: float

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: self.losses[rate])


def sweep(problem: Problem, method: str, steps: int) -> Sweep:
    """Five rates around the one for small bases, further ones while the best is at an end; the one for large bases."""
    large, middle = default_rate(method)[0], RECOMMENDED[method].small
    losses: dict[float, float] = {}

    def measure(rate: float) -> None:
        if rate not in losses:
            losses[rate] = held_out_loss(problem, {method: rate}, 0, steps)

    for by in range(-2, 3):
        measure(neighbour(middle, by))
    for _ in range(3):
        best = min(losses, key=lambda rate: losses[rate])
        if best == max(losses):
            measure(neighbour(best, 1))
        elif best == min(losses):
            measure(neighbour(best, -1))
        else:
            break
    best = min(losses, key=lambda rate: losses[rate])
    at_large = held_out_loss(problem, {method: large}, 0, steps)
    return Sweep(dict(sorted(losses.items())), at_large, held_out_loss(problem, {method: best}, 1, steps))


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
    """One row for each method, one column for each rate."""
    every = sorted({rate for s in found.values() for rate in s.losses})

    def cell(s: Sweep, rate: float) -> str:
        loss = s.losses.get(rate)
        text = "" if loss is None else f"{loss:.3f}"
        return f"**{text}**" if rate == s.best else text

    parameters = sum(p.numel() for p in problem.base().parameters())
    head = ["method", "at the rate for large models", *(f"{rate:.0e}" for rate in every), "best, another seed"]
    body = [
        [name, f"{s.large:.3f} ({default_rate(name)[0]:g})", *(cell(s, rate) for rate in every), f"{s.again:.3f}"]
        for name, s in found.items()
    ]
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
        pairs = [(start, sweeps[method]) for start, sweeps in found.values()]
        tried = sorted(set.intersection(*({*s.losses} for _, s in pairs)))
        missed = {rate: sum(_missed(start, s, s.losses[rate]) for start, s in pairs) / len(pairs) for rate in tried}
        shown = {rate: f"{rate:.0e}: {share:.0%}" for rate, share in missed.items()}
        if chosen := [rate for rate, share in missed.items() if round(share, 2) <= 0.1]:
            shown[chosen[0]] = f"**{shown[chosen[0]]}**"
        large = sum(_missed(start, s, s.large) for start, s in pairs) / len(pairs)
        best = ", ".join(f"{rate:.0e}" for rate in sorted({s.best for _, s in pairs}))
        body.append([method, best, ", ".join(shown.values()), f"{default_rate(method)[0]:g}: {large:.0%}"])
    head = ["method", "best rates", "share of the gain that a rate misses", "the rate for large models misses"]
    return f"## Over {', '.join(found)}\n\n{markdown(head, body)}\n"


def _missed(start: float, sweep: Sweep, loss: float) -> float:
    best = sweep.losses[sweep.best]
    return (loss - best) / (start - best)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--assets", type=Path, help="folder with weights/ and data/; without it, only the demo's base")
    parser.add_argument("--tasks", nargs="+", help="of shakespeare, demo, instructions, letters; all, if left out")
    parser.add_argument("--methods", nargs="+", choices=RECOMMENDED, default=list(RECOMMENDED), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of each training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    given = parser.parse_args()
    known = problems(given.assets)
    if unknown := sorted(set(given.tasks or known) - set(known)):
        raise SystemExit(f"--tasks {' '.join(unknown)}: there are {', '.join(known)}; all but demo need --assets.")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    text = ""
    console, begun = Console(stderr=True), time.monotonic()
    command = " ".join(["python -m benchmarks.learning_rates", *_shown(sys.argv[1:])])
    parts = [
        f"# Learning rates on small pretrained models, {date.today()}\n",
        f"`{command}` with coadapt {coadapt.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, on {machine()}. {given.steps} steps of {BATCH} examples of at most {LONGEST} "
        "tokens, seed 0 (and 1 for the second figure), AdamW, linear schedule with 3 % warm-up, gradients clipped at "
        "1; methods with their recommended options (bitfit and full_copy on all linear layers). Losses are held-out, "
        "in nats per token; bold is the best of a row.\n",
    ]
    overall: dict[str, tuple[float, Mapping[str, Sweep]]] = {}
    for name in given.tasks or known:
        problem, found = known[name], {}
        start = held_out_loss(problem, {"lora": 1.0}, 0, 0)
        for method in given.methods:
            found[method] = sweep(problem, method, given.steps)
            shown = ", ".join(f"{rate:.0e}: {loss:.3f}" for rate, loss in found[method].losses.items())
            console.print(
                f"{time.monotonic() - begun:5.0f} s  {name} {method}  {shown}", highlight=False, soft_wrap=True
            )
        overall[name] = (start, found)
        parts.append(report_sweeps(problem, start, found))
        if problem.task == "causal-lm" and {"lora", "prompt_tuning"} <= set(found):
            parts.append(report_mix(mixes(problem, found["lora"].best, given.steps)))
        text = "\n".join([*parts, report_overall(overall), f"{(time.monotonic() - begun) / 60:.0f} minutes."])
        given.out.mkdir(parents=True, exist_ok=True)
        longer = "" if given.steps == STEPS else f"{given.steps}-steps-"
        (given.out / f"learning_rates-{longer}{date.today()}.md").write_text(text + "\n", "utf-8")
    print(text)


def _shown(arguments: Sequence[str]) -> list[str]:
    """The command line without this machine's folders."""
    hidden = {"--assets": "FOLDER", "--out": "FOLDER"}
    return [hidden.get(before, word) for before, word in zip(["", *arguments], arguments, strict=False)]


if __name__ == "__main__":
    main()
