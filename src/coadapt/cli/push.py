"""`coadapt push`: an adapter folder, with its card, to a model hub."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from coadapt.cli.card import said_by_person
from coadapt.cli.options import inputs

if TYPE_CHECKING:
    from rich.table import Table

    from coadapt.formats.package import Package


def _invoke(
    folder: Path,
    repo: str,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    base_model: str | None,
    **said: str | None,
) -> int:
    from coadapt.cli.output import console, quiet
    from coadapt.formats.hub import check_name, ready_to_send, send
    from coadapt.hub.card import Said
    from coadapt.hub.push import prepare

    quiet()
    with inputs():
        if base_model is not None:
            check_name(base_model)
        if not dry_run:
            ready_to_send()
        parcel = prepare(folder, repo, Said(**said), base_model, write=not dry_run)
    screen = console()
    screen.print(_files(parcel.package, repo))
    if parcel.package.stays:
        screen.print(f"stays here: {', '.join(parcel.package.stays)}", style="dim", markup=False)
    if parcel.card_is_theirs:
        screen.print("README.md was not made by coadapt, and goes as it is.")
    if dry_run:
        screen.print("Nothing was sent, and nothing written (--dry-run).")
        return 0
    address = send(
        parcel.package,
        repo,
        message=message or f"Adapter {folder.resolve().name}",
        private=private or None,
        revision=revision,
    )
    screen.print(f"Sent: {address}", soft_wrap=True, markup=False)
    return 0


def _files(package: "Package", repo: str) -> "Table":
    from rich.table import Table

    table = Table(title=repo, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for name, content in package.files.items():
        note = "without the paths of this machine" if isinstance(content, bytes) and name != "README.md" else ""
        table.add_row(name, f"{package.size(name):,}", note)
    return table


command = click.Command(
    "push",
    callback=_invoke,
    help="""Put an adapter, with its card, on a model hub.

    \b
    coadapt push DIR USER/NAME --data-license cc-by-4.0
    coadapt push DIR USER/NAME --dry-run                   shows what would be sent

    Makes the card anew (`coadapt card`), looks whether every tensor is whole, and sends what belongs to the adapters in
    one commit: never checkpoints, pickles, logs, scores row by row, data, or paths of this machine. The repository is
    made where it is not there. The token is the hub's own: `hf auth login`, or HF_TOKEN.
    """,
    params=[
        click.Argument(["folder"], type=click.Path(path_type=Path), metavar="DIR"),
        click.Argument(["repo"], metavar="USER/NAME"),
        click.Option(["--private"], is_flag=True, help="Make a new repository private."),
        click.Option(["--revision", "--branch", "revision"], metavar="BRANCH", help="Branch; made if it is not there."),
        click.Option(["--message"], help="Of the commit; left out, the folder's name."),
        click.Option(["--dry-run"], is_flag=True, help="Show the files and their sizes; write and send nothing."),
        *said_by_person(),
    ],
)
