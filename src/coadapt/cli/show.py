"""`coadapt show`: the adapters of a folder and where they sit, or the layers of a model."""

from pathlib import Path

import click

from coadapt.cli.completion import paths


def _invoke(folder: Path | None, model: str | None) -> int:
    if folder is None and model is None:
        raise click.UsageError("Give an adapter folder, or --model.")
    from coadapt.cli.output import console, quiet
    from coadapt.training import inspect

    quiet()
    out = console()
    if folder is None:
        assert model is not None
        out.print(inspect.layers_table(inspect.outline(model)))
        return 0
    for table in inspect.folder_tables(folder, model):
        out.print(table)
    return 0


command = click.Command(
    "show",
    callback=_invoke,
    help="""What an adapter folder, or a model, is made of.

    \b
    coadapt show DIR            which adapters at which sites, their share of the base, sizes
    coadapt show --model M      the layers of a model that adapters can sit at
    """,
    params=[
        click.Argument(["folder"], required=False, type=click.Path(path_type=Path), metavar="[DIR]"),
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; with DIR, in place of the one that it names.",
        ),
    ],
)
