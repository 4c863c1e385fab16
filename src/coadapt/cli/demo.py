"""`coadapt demo`: a soft prompt and a LoRA, trained together in a minute on a task that their base fails."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from coadapt.evaluation.intervals import Estimate
    from coadapt.model import PeftModel

SETTINGS: dict[str, Any] = {
    "adapters": {
        "prompt": {"method": "prompt", "num_virtual_tokens": 16, "learning_rate": 1e-2},
        "lora": {"method": "lora", "r": 16, "lora_alpha": 32, "learning_rate": 4e-3},
    },
    "composition": "prompt + lora",
    "per_device_train_batch_size": 16,
    "num_train_epochs": 1,
    "warmup_steps": 0.1,
    "eval_steps": 40,
    "save_strategy": "epoch",
    "logging_steps": 10,
    "use_cpu": True,
}
TRAIN_ROWS, HELD_OUT_ROWS, ASKED, SHOWN = 4800, 64, 40, 3
DATA_SEED = 0
LONGEST = 48
"""Tokens of an answer."""

Table = Mapping[str, Sequence[str]]
"""Who answered -> the answers, in the order of the questions."""


def _invoke(out: Path, seed: int, overwrite: bool, files_only: bool) -> int:
    data = out.with_name(f"{out.name}-data")
    if files_only:
        _write_data(data)
        _copy_base(data / "base")
        click.echo(f"The base is in {data / 'base'}, the rows in {data / 'train.jsonl'} and {data / 'held-out.jsonl'}.")
        return 0
    import torch

    from coadapt.cli.card import write_card_of
    from coadapt.cli.output import console, quiet
    from coadapt.demo import BASE
    from coadapt.demo.task import exact_match, examples
    from coadapt.training.run import train
    from coadapt.training.settings import RunConfig

    quiet()
    started, screen = time.monotonic(), console()
    # With one thread sums do not depend on how many cores there are, or on how busy they are: same seed, same numbers.
    # At this size more threads would mostly wait for each other.
    torch.set_num_threads(1)
    screen.print(_INTRODUCTION, soft_wrap=True)
    _write_data(data)
    run = RunConfig(
        model=str(BASE),
        data=str(data / "train.jsonl"),
        eval_data=str(data / "held-out.jsonl"),
        output_dir=str(out),
        overwrite_output_dir=overwrite,
        seed=seed,
        **SETTINGS,
    )
    done = train(run, screen)
    if done.interrupted:
        click.echo("Stopped.")
        return 1
    write_card_of(out)
    tokenizer: Any = done.processor
    view, rows = done.view.eval(), examples("held-out", ASKED, DATA_SEED + 1)
    answers = _answers(view, tokenizer, [row["prompt"] for row in rows])
    scores = {who: exact_match(given, rows) for who, given in answers.items()}
    _show(screen, rows, answers, scores)
    _merge(screen, view, tokenizer, [row["prompt"] for row in rows], answers["prompt + lora"])
    screen.print(_NEXT.format(seconds=time.monotonic() - started, out=out), soft_wrap=True)
    return 0


def _write_data(folder: Path) -> None:
    from coadapt.demo.task import examples

    folder.mkdir(parents=True, exist_ok=True)
    for name, split, count in (("train", "train", TRAIN_ROWS), ("held-out", "held-out", HELD_OUT_ROWS)):
        lines = (json.dumps(row) + "\n" for row in examples(split, count, DATA_SEED))  # type: ignore[arg-type]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def _copy_base(folder: Path) -> None:
    from coadapt.demo import BASE

    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Move it away, or give another --out.")
    shutil.copytree(BASE, folder)


def _answers(view: "PeftModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> dict[str, list[str]]:
    """The answers of the base, of each adapter alone, and of both."""
    found: dict[str, list[str]] = {}
    with view.disable_adapter():
        found["the base"] = _generate(view, tokenizer, prompts)
    for who in ("prompt", "lora", "prompt + lora"):
        with view.using(who):
            found[who] = _generate(view, tokenizer, prompts)
    return found


def _generate(view: "PeftModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> list[str]:
    from coadapt.evaluation.exam import answers

    return answers(view, tokenizer, tokenizer(list(prompts)).input_ids, max_new_tokens=LONGEST)


def _show(
    screen: "Console", rows: Sequence[Mapping[str, str]], answers: Table, scores: Mapping[str, "Estimate"]
) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    for number in range(SHOWN):
        table = RichTable(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("", Text(rows[number]["prompt"].removesuffix("\nA:"), "italic"))
        wanted = rows[number]["completion"].strip()
        for who, given in answers.items():
            right = given[number].strip() == wanted
            table.add_row(who, Text(f"{'✓' if right else '✗'} {given[number].strip()}", "green" if right else ""))
        screen.print("", table)
    screen.print(f"\nright, of {len(rows)} questions about scenes that were never trained on (95 % interval):")
    for who, score in scores.items():
        spread = f"({100 * score.low:.0f} to {100 * score.high:.0f})"
        line = f"  {who:14}{score.mean:>5.0%}  {spread:10}  {'█' * round(score.mean * 40)}"
        screen.print(Text(line, "bold" if who == "prompt + lora" else ""))


def _merge(
    screen: "Console",
    view: "PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    before: Sequence[str],
) -> None:
    """The LoRA goes into the weights, the prompt stays beside them, and everything comes back to the bit."""
    weights = {name: value.clone() for name, value in view.get_base_model().state_dict().items()}
    view.merge_adapter()
    same = sum(a == b for a, b in zip(_generate(view, tokenizer, prompts), before, strict=True))
    view.unmerge_adapter()
    back = all(value.equal(weights[name]) for name, value in view.get_base_model().state_dict().items())
    screen.print(
        f"\nmerged the LoRA into the weights: {same} of {len(prompts)} answers are the same; "
        f"unmerged: the base is {'bit for bit what it was' if back else 'NOT what it was'}."
    )


_INTRODUCTION = """The base: a tiny language model that knows a world of people and things, and answers in English.
The task: answer with a record of two lines instead. A soft prompt and a LoRA learn it together, on one frozen base.
"""

_NEXT = """
Done in {seconds:.0f} seconds. Everything is in [bold]{out}[/bold]: the adapters, the picture [bold]loss.png[/bold], the
log, the settings. Try next:

  coadapt show {out}
  coadapt eval --adapter {out}                                  on the rows that were held out
  coadapt generate --adapter {out} --prompt $'Mia hid the red kite in the barn.\\nQ: Where is the kite?\\nA:'
  coadapt train --model DIR_OR_ID --data FILE --method lora     your own model and data
"""

command = click.Command(
    "demo",
    callback=_invoke,
    help="""Adapt a tiny model in a minute: offline, on the CPU.

    A soft prompt and a LoRA are trained together on a task that the base fails. Shows the answers before and after,
    with each adapter alone and with both, and leaves a folder like that of every `coadapt train`.
    """,
    params=[
        click.Option(
            ["--out"], type=click.Path(path_type=Path), default=Path("coadapt-demo"), show_default=True, help="Folder."
        ),
        click.Option(["--seed"], type=int, default=0, show_default=True, help="Same seed, same numbers."),
        click.Option(["--overwrite"], is_flag=True, help="Replace the results of an earlier demo there."),
        click.Option(["--files-only"], is_flag=True, help="Only write base and rows, into OUT-data, to try things on."),
    ],
)
