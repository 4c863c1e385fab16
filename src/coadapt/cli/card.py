"""`coadapt card`: the model card of an adapter folder."""

from pathlib import Path

import click

from coadapt.cli.options import inputs


def said_by_person() -> list[click.Option]:
    """What no folder can tell: of `card` and `push`."""
    return [
        click.Option(["--license"], metavar="ID", help="Licence of the adapter, as hubs write it: apache-2.0, mit …"),
        click.Option(
            ["--data-license"],
            metavar="ID",
            help="Licence of the data that it was trained on; left out, what the card has, or the data's own source.",
        ),
        click.Option(["--language"], metavar="CODE", help="Language that it is for: en, fr …"),
        click.Option(
            ["--base-model"],
            metavar="USER/NAME",
            help="The base on the hub, where the folder names it by a path of this machine.",
        ),
    ]


def write_card_of(folder: Path) -> None:
    """The card of a run that has just ended well, which it does whatever becomes of the card."""
    from coadapt.hub.card import write_card

    try:
        write_card(folder)
    except (ValueError, OSError) as error:
        click.echo(f"warning: no card was written: {error}", err=True)


def _invoke(folder: Path, repo: str | None, base_model: str | None, **said: str | None) -> int:
    from coadapt.cli.output import quiet
    from coadapt.formats.hub import check_name
    from coadapt.formats.package import CARD
    from coadapt.hub.card import Said, write_card

    quiet()
    with inputs():
        for name in (repo, base_model):
            if name is not None:
                check_name(name)
        made = write_card(folder, Said(**said), repo, base_model)
    click.echo(
        f"Written: {folder / CARD}. Intended use and limits are yours to fill in; they stay when it is made anew."
    )
    if made.data_licence is None:
        click.echo("The licence of the data is unknown. If you know it: --data-license ID")
    return 0


command = click.Command(
    "card",
    callback=_invoke,
    help="""Write the model card of an adapter folder.

    \b
    coadapt card DIR --license apache-2.0 --data-license cc-by-4.0
    coadapt card DIR --repo USER/NAME

    README.md is made from what the folder recorded: adapters, lines that load them, scores of `coadapt eval`, training,
    versions, programs. What was not measured is not claimed, and no path or row of yours is in it. Made anew, it keeps
    whatever stands outside of its two marks, and your metadata.
    """,
    params=[
        click.Argument(["folder"], type=click.Path(path_type=Path), metavar="DIR"),
        click.Option(["--repo"], metavar="USER/NAME", help="Repository that its lines name; left out, the folder."),
        *said_by_person(),
    ],
)
