"""Options that several verbs have."""

import click


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
