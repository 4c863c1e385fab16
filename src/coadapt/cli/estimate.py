"""`coadapt estimate`: what a training will need, before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import click

from coadapt.cli.train import TrainCommand, read_settings, settings
from coadapt.training.settings import PlannedRun

SETTINGS = frozenset(
    """model revision dtype load_in_4bit load_in_8bit task data dataset_config eval_data eval_split text_column
    prompt_column completion_column label_column image_column prompt_separator completion_only_loss max_length method
    composition per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_strategy optim
    gradient_checkpointing bf16 fp16 use_cpu verify""".split()
)
"""Those of a run that decide what it needs."""


def _invoke(config: Path | None, overrides: tuple[str, ...], calibrate: bool, as_json: bool, **flags: Any) -> int:
    run = read_settings(config, flags, overrides, PlannedRun)
    from coadapt.cli.output import console, quiet
    from coadapt.training.estimate import estimated
    from coadapt.training.estimate_table import tables

    quiet()
    try:
        found = estimated(run, calibrate)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(found.plain(), indent=2, ensure_ascii=False))
        return 0 if found.fits else 1
    out = console()
    for table in tables(found):
        out.print(table)
    return 0 if found.fits else 1


command = TrainCommand(
    "estimate",
    callback=_invoke,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110},
    help="""What a training will need, before anything is loaded.

    \b
    coadapt estimate --model DIR_OR_ID --method "prompt + lora" --batch-size 4 --max-length 512
    coadapt estimate --config run.yaml --calibrate

    Takes the settings of coadapt train, and reads the model's configuration, not its weights: the step that train would
    run is run on tensors without data, and every byte is counted. Without data, all rows are as long as max_length.

    Exits with 0 where it fits into the memory that is free here, else with 1.
    """,
    params=[
        click.Argument(["overrides"], nargs=-1, metavar="[NAME=VALUE]..."),
        click.Option(
            ["--config"], type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file with settings."
        ),
        click.Option(["--calibrate"], is_flag=True, help="Run real steps, on random weights: their time and memory."),
        click.Option(["--json", "as_json"], is_flag=True, help="As JSON, for programs."),
        *settings(SETTINGS),
    ],
)
