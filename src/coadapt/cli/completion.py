"""`coadapt completion`: what the Tab key needs. And what it offers after the flags that take a path or a word."""

from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
Offer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def paths(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """The shell's own completion of files and folders."""
    return [CompletionItem(begun, type="file")]


def words(known: Sequence[str]) -> Offer:
    """Those of `known` that begin as what is typed."""
    return lambda ctx, parameter, begun: [CompletionItem(word) for word in known if word.startswith(begun)]


def _invoke(shell: str) -> int:
    from coadapt.cli.group import group

    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(group, {}, "coadapt", "_COADAPT_COMPLETE").source())
    return 0


command = click.Command(
    "completion",
    callback=_invoke,
    help="""The script that lets a shell complete coadapt.

    Prints it. One line installs it:

    \b
    echo 'eval "$(coadapt completion bash)"' >> ~/.bashrc
    echo 'eval "$(coadapt completion zsh)"' >> ~/.zshrc
    coadapt completion fish > ~/.config/fish/completions/coadapt.fish
    """,
    params=[click.Argument(["shell"], type=click.Choice(SHELLS))],
)
