"""`coadapt compare`: methods and mixes on one model and one data set, under equal budgets."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from coadapt.cli.train import built, read_values, settings
from coadapt.tuning.candidates import NOT_HERE
from coadapt.tuning.plan import CompareConfig, Trainings

if TYPE_CHECKING:
    from rich.console import Console

Found = TypeVar("Found")
OWN: dict[str, str] = {
    "methods": "LIST",
    "budget": "STEPS|TIME",
    "seeds": "NUMBER",
    "rates": "NUMBER",
    "score": "NAME",
    "validation_split": "NUMBER",
    "out": "DIR",
}
"""Flag -> what stands for its value."""


def _invoke(config: Path | None, overrides: tuple[str, ...], as_json: bool, **flags: Any) -> int:
    plan = built(lambda: _read(config, overrides, flags))
    from coadapt.tuning.compare import compare
    from coadapt.tuning.outcome import plain, tell
    from coadapt.tuning.report import REPORT

    found = carried_out(lambda console: compare(plan, console), as_json)
    if found is None:
        return 1
    shown(found, plain, tell, as_json)
    if not as_json:
        click.echo(f"\nThe report: {plan.out / REPORT}")
    return 0


def carried_out(work: Callable[["Console"], Found], as_json: bool) -> Found | None:
    """What many trainings came to; None where they were stopped. With `as_json` progress goes to standard error.

    Raises:
        click.UsageError: what was asked does not fit.
    """
    from rich.console import Console

    from coadapt.cli.output import console, quiet
    from coadapt.tuning.trial import Interrupted

    quiet()
    try:
        return work(Console(stderr=True, highlight=False) if as_json else console())
    except (ValueError, FileNotFoundError) as error:
        raise click.UsageError(str(error)) from error
    except Interrupted:
        click.echo("\nStopped; what had ended is kept. Go on with the same command.", err=as_json)
        return None


def shown(found: Found, plain: Callable[[Found], Any], tell: Callable[[Found], Iterable[Any]], as_json: bool) -> None:
    """Prints what was found: its plain values as JSON, or what `tell` makes of it."""
    from coadapt.cli.output import console

    if as_json:
        click.echo(json.dumps(plain(found), ensure_ascii=False))
        return
    screen = console()
    for part in tell(found):
        screen.print(part)


def _read(config: Path | None, overrides: tuple[str, ...], flags: dict[str, Any]) -> CompareConfig:
    plan = CompareConfig.read(read_values(config, flags, overrides))
    _ = plan.runs  # what does not fit in one of them is told now
    return plan


def options(of: type[Trainings], own: Mapping[str, str]) -> list[click.Option]:
    """A flag for each of the fields `own`, which tells what stands for its value."""
    found: list[click.Option] = []
    for name, metavar in own.items():
        field = of.model_fields[name]
        default = field.get_default(call_default_factory=True)
        told = (
            ",".join(default)
            if isinstance(default, list)
            else ("off", "on")[default]
            if isinstance(default, bool)
            else default
        )
        known = "" if told in (None, "") or field.is_required() else f"  [{told}]"
        flag = name.replace("_", "-")
        names = [f"--{flag}" if metavar else f"--{flag}/--no-{flag}", name]
        text = " ".join(f"{field.description}{known}".split())
        found.append(click.Option(names, metavar=metavar or None, default=None, show_default=False, help=text))
    return found


def hidden(own: Iterable[str]) -> list[click.Option]:
    """The flags of `coadapt train` that are taken as well; the help shows the first few."""
    found: list[click.Option] = []
    for option in settings():
        if option.name not in (*NOT_HERE, *own):
            option.hidden = option.name not in ("model", "data", "seed")
            found.append(option)
    return found


command = click.Command(
    "compare",
    callback=_invoke,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110},
    help="""Compare methods and mixes on your data, under equal budgets.

    \b
    coadapt compare --model DIR_OR_ID --data FILE --methods lora,prompt,lora+prompt
                    --budget 300 --out DIR

    Each method gets the same rows, the same budget and the same number of learning rates to choose from on rows that
    are not scored; then it is trained with several seeds, and the held-out rows are scored once. The report says what
    the spread of seeds and rows carries, and no more. Stopped or killed, the same command goes on: a training that has
    ended is never made again.

    Every setting of `coadapt train` (see its --help) is taken as well, and holds for all trainings; an option of a
    method goes to all methods that read it. More in docs/comparing.md.
    """,
    params=[
        click.Argument(["overrides"], nargs=-1, metavar="[NAME=VALUE]..."),
        click.Option(
            ["--config"], type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file with settings."
        ),
        *options(CompareConfig, OWN),
        *hidden(OWN),
        click.Option(["--json", "as_json"], is_flag=True, help="Print results.json, and progress on standard error."),
    ],
)
