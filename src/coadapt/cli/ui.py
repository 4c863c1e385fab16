"""`coadapt ui`: a page in the browser, served on this machine alone."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import click

from coadapt.cli.completion import paths
from coadapt.cli.options import inputs

PORT = 7860


def _invoke(runs: Path, port: int, model: str | None) -> int:
    if find_spec("gradio") is None:
        raise click.UsageError('ui needs Gradio: pip install "coadapt[ui]"')
    from coadapt.ui.server import check_port, serve

    with inputs():
        check_port(port)
        serve(runs, port, model or "", lambda address: _ready(address, runs))
    return 0


def _ready(address: str, runs: Path) -> None:
    click.echo(_READY.format(address, runs))
    Thread(target=_import, daemon=True).start()


def _import() -> None:
    """What a chat or an estimate needs, while the page is being looked at."""
    from coadapt.cli.output import quiet

    quiet()
    import_module("coadapt.ui.talk")


_READY = "{} shows the runs in {}. Ctrl-C ends the page; trainings go on."


command = click.Command(
    "ui",
    callback=_invoke,
    help="""A page in the browser: train, watch, chat, compare.

    \b
    coadapt ui
    coadapt ui --runs outputs --model DIR_OR_ID --port 8000

    Trainings that are started there are processes of their own (`coadapt train --config …`) and go on when the page is
    closed; runs that were started on the command line are found, too. The page is served to this machine alone.
    """,
    params=[
        click.Option(
            ["--runs"],
            type=click.Path(file_okay=False, path_type=Path),
            default=Path("runs"),
            show_default=True,
            help="Folder that runs are in.",
        ),
        click.Option(["--port"], type=click.IntRange(1, 65535), default=PORT, show_default=True, help="Of 127.0.0.1."),
        click.Option(["--model"], shell_complete=paths, help="The base that the form proposes: a folder or a hub id."),
    ],
)
