"""`coadapt data check`: your data looked at before it is trained on."""

import json
from pathlib import Path
from typing import Any

import click

from coadapt.cli.completion import paths
from coadapt.cli.train import TrainCommand, read_settings, settings
from coadapt.training.settings import DataToCheck

SETTINGS = frozenset(
    """model revision task dataset_config eval_data eval_split text_column prompt_column completion_column label_column
    image_column prompt_separator completion_only_loss max_length seed""".split()
)
"""Those of a run that decide how its data is read."""


def _invoke(data: str | None, config: Path | None, as_json: bool, **flags: Any) -> int:
    run = read_settings(config, {"data": data, **flags}, (), DataToCheck)
    from coadapt.cli.output import console, quiet
    from coadapt.training.data_check import check_data, tables

    quiet()
    try:
        checks = check_data(run)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    fine = all(check.fine for check in checks)
    if as_json:
        told = {"fine": fine, "datasets": [check.plain() for check in checks]}
        click.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return 0 if fine else 1
    out = console()
    for check in checks:
        if len(checks) > 1:
            out.rule(check.name)
        for part in tables(check):
            out.print(part)
    return 0 if fine else 1


command = click.Group(
    "data",
    help="Look at your data before it is trained on.",
    commands=[
        TrainCommand(
            "check",
            callback=_invoke,
            context_settings={
                "token_normalize_func": lambda name: name.replace("_", "-"),
                "max_content_width": 110,
            },
            help="""What the data is, and what is wrong with it.

            \b
            coadapt data check FILE --model DIR_OR_ID
            coadapt data check --config run.yaml

            Format, rows, lengths; copies, empty rows, rows that are cut or have nothing to train on, classes that
            contradict or outnumber each other, held-out rows that stand in train; one row with the trained tokens
            marked; and what to change. Without a model, lengths are in characters, and nothing is said of tokens.

            Exits with 0 where nothing was found, with 1 where something was, with 2 where the data cannot be read.
            """,
            params=[
                click.Argument(["data"], required=False, shell_complete=paths, metavar="[FILE]"),
                click.Option(
                    ["--config"],
                    type=click.Path(exists=True, dir_okay=False, path_type=Path),
                    help="YAML file with the settings of a run.",
                ),
                click.Option(["--json", "as_json"], is_flag=True, help="As JSON, for programs."),
                *settings(SETTINGS, methods_too=False),
            ],
        )
    ],
)
