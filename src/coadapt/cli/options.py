"""Options that several verbs have, and what becomes of input that does not fit."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import IO, Any

import click


class WrongInput(click.ClickException):
    """What was given does not fit: one line, exit code 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=file is None)


@contextmanager
def inputs() -> Generator[None]:
    """Context for reading what was given: a complaint about it ends the verb with exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise WrongInput(str(error)) from error


def answering() -> list[click.Option]:
    """How an answer is made: of `generate` and `chat`."""
    return [
        click.Option(
            ["--max-new-tokens"], type=click.IntRange(1), default=128, show_default=True, help="Longest answer."
        ),
        click.Option(
            ["--temperature"],
            type=click.FloatRange(0),
            default=0.0,
            show_default=True,
            help="0: always the likeliest token; else sampled.",
        ),
        click.Option(["--seed"], type=int, default=42, show_default=True, help="Of the sampling."),
        click.Option(["--use-cpu"], is_flag=True, help="Do not use a GPU even if there is one."),
    ]
