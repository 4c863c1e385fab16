"""`coadapt show`: the adapters of a folder and where they sit, or what a model has for adapters to sit at."""

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
        base = inspect.outline(model)
        for table in (inspect.layers_table(base), *inspect.coverage_tables(base)):
            out.print(table)
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
    coadapt show --model M      the layers of a model, their roles, and where each method has a place
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
