"""`coadapt compat`: which programs load an adapter as it is, and what mends a no."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from coadapt.cli.completion import paths
from coadapt.cli.options import inputs

if TYPE_CHECKING:
    from rich.text import Text

    from coadapt.formats.facts import Contents, Facts
    from coadapt.formats.programs import Verdict


INDENT = 21
"""Columns before a reason."""


def _invoke(folder: Path, model: str | None, as_json: bool) -> int:
    from coadapt.cli.output import console, quiet
    from coadapt.formats.facts import read_facts
    from coadapt.formats.programs import PROGRAMS

    quiet()
    with inputs():
        contents = read_facts(folder)
        name = model or next(
            (str(n) for f in contents.adapters if (n := f.config.get("base_model_name_or_path"))), None
        )
        base = _base(name, told=model is not None)
        contents = read_facts(folder, base)
    found = {facts.name: [program.judge(facts) for program in PROGRAMS] for facts in contents.adapters}
    if as_json:
        click.echo(json.dumps(_plain(folder, name, contents, found), indent=2, ensure_ascii=False))
        return 0
    screen = console()
    for facts in contents.adapters:
        for line in _lines(facts, found[facts.name], screen.width):
            screen.print(line, soft_wrap=True)
        screen.print()
    for line in _together(folder, contents):
        screen.print(line, soft_wrap=True, markup=False)
    return 0


def _base(name: str | None, told: bool) -> Mapping[str, Any] | None:
    """What decides of the base, from here or from the cache of the hub: nothing is downloaded for it."""
    from transformers import AutoConfig

    if name is None:
        return None
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        if told:
            raise ValueError(f"--model {name!r} is no folder with a model, nor a model that was downloaded.") from error
        return None
    return {"model_type": config.model_type, "num_hidden_layers": getattr(config, "num_hidden_layers", None)}


def _lines(facts: "Facts", verdicts: Sequence["Verdict"], width: int) -> Iterator["Text"]:
    """The answers for one adapter. Commands are never broken, so that they can be copied."""
    from textwrap import wrap

    from rich.text import Text

    kind = facts.kind.lower().replace("_", "-")
    rank = f" of rank {', '.join(map(str, sorted(facts.ranks)))}" if facts.kind in ("LORA", "DORA") else ""
    yield Text(f"{facts.name}: {kind}{rank}", "bold")
    for verdict in verdicts:
        answer = ("yes", "green") if verdict.loads else ("no ", "red")
        head = Text.assemble(f"  {verdict.program:14}", answer, "  ")
        if verdict.loads:
            yield head.append(verdict.command or "", "bold")
            continue
        said = "; ".join(verdict.reasons)
        first, *rest = wrap(said, max(width - INDENT, 30))
        yield head.append(first)
        yield from (Text(" " * INDENT + line) for line in rest)
        if verdict.command:
            yield Text.assemble(" " * INDENT, "→ ", (verdict.command, "bold"))
        else:
            yield Text(" " * INDENT + "nothing mends that", "dim")


def _together(folder: Path, contents: "Contents") -> Iterator[str]:
    """What is to be said of several adapters at once."""
    from coadapt.core.composition import names
    from coadapt.formats.programs import mergeable

    active = names(contents.composition)
    if len(active) < 2:
        return
    stuck = [f.name for f in contents.adapters if f.name in active and not mergeable(f)]
    shown = contents.composition if isinstance(contents.composition, str) else repr(contents.composition)
    yield f"Together, as {shown}, only coadapt loads them."
    if stuck:
        yield f"{' and '.join(stuck)} cannot be part of any weights, so no one folder holds all of it elsewhere."
    else:
        yield f"One adapter, or one model, of all of them:\n  coadapt export {folder} --for vllm"


def _plain(
    folder: Path, base: str | None, contents: "Contents", found: Mapping[str, Sequence["Verdict"]]
) -> dict[str, Any]:
    shown = contents.composition if isinstance(contents.composition, str) else repr(contents.composition)
    adapters = {
        facts.name: {
            "method": facts.kind,
            "folder": str(facts.folder),
            "programs": {
                verdict.program: {
                    "loads": verdict.loads,
                    "reasons": list(verdict.reasons),
                    "command": verdict.command,
                }
                for verdict in found[facts.name]
            },
        }
        for facts in contents.adapters
    }
    return {"folder": str(folder), "base": base, "composition": shown, "adapters": adapters}


command = click.Command(
    "compat",
    callback=_invoke,
    help="""Which programs load an adapter, and what mends a no.

    \b
    coadapt compat DIR

    DIR is an adapter folder (of coadapt or of peft), a composition, or a checkpoint of transformers' Trainer. For each
    program: whether it loads the adapter as it is, with the line that does; or why not, with the one command that mends
    it. Judged is the adapter; whether a program runs the base is its own list of models. Nothing is loaded or written.
    """,
    params=[
        click.Argument(["folder"], type=click.Path(path_type=Path), metavar="DIR"),
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder, or a hub id that was downloaded; left out, the one that the adapter names.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print it as JSON."),
    ],
)
