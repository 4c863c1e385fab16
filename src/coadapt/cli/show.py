"""`coadapt show`: the adapters of a folder and where they sit, or what a model has for adapters to sit at."""

from pathlib import Path

import click

from coadapt.cli.completion import paths


def _invoke(folder: Path | None, model: str | None, targets: bool, picture: Path | None) -> int:
    if folder is None and model is None:
        raise click.UsageError("Give an adapter folder, or --model.")
    if picture is not None and folder is None:
        raise click.UsageError("--picture draws what the routers of an adapter folder used: give the folder.")
    if targets and (model is None or folder is not None):
        raise click.UsageError("--targets shows what target_modules can name in a model: give --model, and no folder.")
    from coadapt.cli.output import console, quiet
    from coadapt.formats.files import aside
    from coadapt.training import inspect, usage

    quiet()
    out = console()
    if folder is None:
        assert model is not None
        base = inspect.outline(model)
        if targets:
            tables = inspect.targets_tables(base)
        else:
            tables = (inspect.layers_table(base), *inspect.coverage_tables(base))
        for table in tables:
            out.print(table)
        return 0
    used = usage.read_usage(folder)
    for table in (*inspect.folder_tables(folder, model), *usage.usage_tables(used)):
        out.print(table)
    if picture is not None:
        with aside(picture) as file:
            usage.draw_usage(used, file)
        out.print(f"\ndrawn in {picture}", highlight=False)
    return 0


command = click.Command(
    "show",
    callback=_invoke,
    help="""What an adapter folder, or a model, is made of.

    \b
    coadapt show DIR                  which adapters, at which sites; what routers used
    coadapt show --model M            its layers and roles; where each method has a place
    coadapt show --model M --targets  what target_modules can name in it
    """,
    params=[
        click.Argument(["folder"], required=False, type=click.Path(path_type=Path), metavar="[DIR]"),
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; with DIR, in place of the one that it names.",
        ),
        click.Option(["--targets"], is_flag=True, help="With --model: what its target_modules can name."),
        click.Option(
            ["--picture"],
            type=click.Path(path_type=Path, dir_okay=False),
            shell_complete=paths,
            help="Draw how much each adapter was used, layer by layer, as a PNG (where DIR has a router).",
        ),
    ],
)
