"""Writes docs/commands.md: the help of every verb, as the command line prints it.

python tools/commands_page.py [--print]
"""

import sys
from pathlib import Path

import click

from coadapt.cli.group import VERBS, group

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
WIDTH = 88


def page() -> str:
    """The whole page."""
    parts = [
        "# The commands\n\nMade by `tools/commands_page.py` from what `coadapt VERB --help` prints. Every setting of\n"
        "`coadapt train` has the same name as a flag, in YAML and in Python.\n",
        *(_of(group.get_command(click.Context(group), verb), ["coadapt", verb], 2) for verb in VERBS),
    ]
    return "\n".join(parts)


def _of(command: click.Command | None, names: list[str], depth: int) -> str:
    assert command is not None
    parent = click.Context(
        command,
        info_name=" ".join(names),
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )
    text = f"{'#' * depth} {' '.join(names)}\n\n```text\n{command.get_help(parent)}\n```\n"
    if isinstance(command, click.Group):
        inner = [_of(command.get_command(parent, n), [*names, n], depth + 1) for n in command.list_commands(parent)]
        return "\n".join([text, *inner])
    return text


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page(), end="")
    else:
        PAGE.write_text(page(), "utf-8")
