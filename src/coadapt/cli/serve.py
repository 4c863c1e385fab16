"""`coadapt serve`: a base and its adapters behind an OpenAI-shaped address."""

import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from coadapt.cli.completion import paths, words
from coadapt.cli.options import inputs

if TYPE_CHECKING:
    from coadapt.serving.opening import Given, Opened

KEY = "COADAPT_API_KEY"
PARTS = ("fastapi", "prometheus_client", "uvicorn")
"""What `coadapt[serve]` brings."""
OURS = ("adapters_dir", "queue", "max_tokens", "max_choices", "max_body", "stop_after", "use_cpu", "tokens")
"""Options that vLLM has no place for, or under another name."""
SHOWN = 8


def _invoke(folder: Path | None, model: str | None, adapter: tuple[str, ...], engine: str, **options: Any) -> int:
    from coadapt.cli.output import quiet

    given = _given(folder, adapter)
    if engine == "vllm":
        _refuse_ours()
        quiet()
        return _hand_over(given, model, options)
    if missing := [name for name in PARTS if find_spec(name) is None]:
        raise click.UsageError(f'serve needs {" and ".join(missing)}: pip install "coadapt[serve]"')
    if model is None and not given and options["adapters_dir"] is None:
        raise click.UsageError("There is nothing to serve: give DIR, --adapter, --adapters-dir or --model.")
    quiet()
    return _serve(given, model, options)


def _given(folder: Path | None, adapter: tuple[str, ...]) -> "list[Given]":
    from coadapt.serving.opening import Given

    with inputs():
        return [Given.read(text) for text in (*([str(folder)] if folder else ()), *adapter)]


def _serve(given: "list[Given]", model: str | None, options: dict[str, Any]) -> int:
    import asyncio

    from coadapt.serving.server import Service, bound

    key = _key(options["api_key"])
    with inputs():
        where = bound(options["host"], options["port"], key)
    with where:
        serving, opened = _made(given, model, key, options)
        ready = partial(_greet, where.getsockname(), options["host"], opened, key is not None)
        asyncio.run(Service(serving, where, stop_after=options["stop_after"]).run(ready))
    return 0


def _made(given: "list[Given]", model: str | None, key: str | None, options: dict[str, Any]) -> Any:
    """What a request can reach, and what of it a person is told."""
    from coadapt.serving.app import Serving
    from coadapt.serving.catalog import Catalog
    from coadapt.serving.engine import Engine
    from coadapt.serving.limits import Limits
    from coadapt.serving.opening import introduced, opened
    from coadapt.training.machine import chosen

    most = options["max_loaded"]
    with inputs():
        found = opened(model, given, options["adapters_dir"], name=options["name"], device=chosen(options["use_cpu"]))
        engine = Engine(
            found.view,
            found.tokenizer,
            rows=options["rows"],
            queue=options["queue"],
            tokens=options["tokens"],
            loaded=most,
        )
        entries, notes = introduced(engine, found.entries, most)
        found = replace(found, entries=entries, notes=[*found.notes, *notes])
    catalog = Catalog(
        engine,
        base=found.base,
        root=found.root,
        framing=found.framing,
        entries=found.entries,
        adapters_dir=options["adapters_dir"],
    )
    limits = Limits(body=options["max_body"], max_tokens=options["max_tokens"], choices=options["max_choices"])
    serving = Serving(
        view=found.view,
        tokenizer=found.tokenizer,
        engine=engine,
        catalog=catalog,
        limits=limits,
        key=key,
    )
    return serving, found


def _key(told: str | None) -> str | None:
    key = told if told is not None else os.environ.get(KEY) or None
    if key is not None and not (key and key == key.strip() and key.isascii() and key.isprintable()):
        raise click.UsageError("--api-key must be printable ASCII, without spaces around it: it travels in a header.")
    return key


def _greet(address: tuple[Any, ...], host: str, opened: "Opened", with_key: bool) -> None:
    from rich.markup import escape

    from coadapt.cli.output import console

    where = f"http://{f'[{host}]' if ':' in host else host}:{address[1]}"
    names = [opened.base, *(entry.name for entry in opened.entries)]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    key = ' -H "Authorization: Bearer $COADAPT_API_KEY"' if with_key else ""
    example = (
        f"curl {where}/v1/completions{key} -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{names[min(1, len(names) - 1)]}", "prompt": "Once upon a time"}}\''
    )
    for note in opened.notes:
        click.echo(f"note: {note}", err=True)
    screen = console()
    screen.print(f"Serving {escape(', '.join(names[:SHOWN]))}{more} at {where}/v1 (Ctrl-C stops)", soft_wrap=True)
    screen.print(f"  {escape(example)}", soft_wrap=True)
    screen.file.flush()


# ---- vLLM ------------------------------------------------------------------------------------------------------------


def _refuse_ours() -> None:
    context = click.get_current_context()
    told = [n for n in OURS if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]
    if told:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in told)
        raise click.UsageError(f"{shown} has no effect with --engine vllm. Leave it out.")


def _hand_over(given: "list[Given]", model: str | None, options: dict[str, Any]) -> int:
    import shlex

    from coadapt.exporting.showing import lines
    from coadapt.serving import vllm

    def set_by_hand(name: str) -> Any:
        source = click.get_current_context().get_parameter_source(name)
        return options[name] if source is ParameterSource.COMMANDLINE else None

    key = _key(options["api_key"])
    with inputs():
        base = vllm.base_of_all(model, given)
        modules = vllm.modules(given, model, lambda done: click.echo("\n".join(lines(done))), use_cpu=False)
        told = {
            "host": options["host"],
            "port": options["port"],
            "served-model-name": options["name"],
            "max-num-seqs": set_by_hand("rows"),
            "max-cpu-loras": set_by_hand("max_loaded"),
        }
        line = vllm.command(base, modules, told)
        program = vllm.find(line)
    click.echo(shlex.join(line))
    os.execve(program, line, {**os.environ, **({vllm.KEY: key} if key else {})})


# ---- the verb --------------------------------------------------------------------------------------------------------

command = click.Command(
    "serve",
    callback=_invoke,
    help="""Serve a base and many adapters, as OpenAI's API.

    \b
    coadapt serve DIR                                  the adapter, and its base
    coadapt serve --model M --adapter fr=DIR --adapter de=DIR2
    coadapt serve --model M --adapters-dir DIR         every adapter in DIR
    coadapt serve DIR --engine vllm                    hands over to vLLM

    A request's `model` says who answers: the base, an adapter, or a composition such as `fr + 0.5*style`. Requests to
    different adapters go through the base together, in one batch. With --adapters-dir, clients can load and unload
    what lies there. The first Ctrl-C lets what runs finish, the second stops it.
    """,
    params=[
        click.Argument(["folder"], required=False, type=click.Path(path_type=Path), metavar="[DIR]"),
        click.Option(
            ["--model"],
            shell_complete=paths,
            help="The base: a folder or a hub id; left out, the one that the first adapter names.",
        ),
        click.Option(
            ["--adapter"], multiple=True, metavar="NAME=DIR", help="An adapter folder and its name; may be repeated."
        ),
        click.Option(
            ["--adapters-dir"],
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder of adapter folders: all are served, and clients can load from it.",
        ),
        click.Option(["--name"], help="What clients call the base; left out, its folder's name or hub id."),
        click.Option(
            ["--host"], default="127.0.0.1", show_default=True, help="Address to listen at; others need an API key."
        ),
        click.Option(["--port"], type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one."),
        click.Option(["--api-key"], help=f"What clients must send; or set {KEY}, which no other user can see."),
        click.Option(
            ["--engine"],
            type=click.Choice(["coadapt", "vllm"]),
            default="coadapt",
            show_default=True,
            shell_complete=words(("coadapt", "vllm")),
            help="vllm: write what vLLM needs, and run `vllm serve`.",
        ),
        click.Option(
            ["--rows"], type=click.IntRange(1), default=32, show_default=True, help="Answers that are made at once."
        ),
        click.Option(
            ["--queue"], type=click.IntRange(1), default=256, show_default=True, help="Answers that wait; more get 429."
        ),
        click.Option(
            ["--tokens"], type=click.IntRange(1), help="Prompt and answer, at most; left out, what the model takes."
        ),
        click.Option(["--max-tokens"], type=click.IntRange(1), default=1024, show_default=True, help="Longest answer."),
        click.Option(
            ["--max-choices"], type=click.IntRange(1), default=16, show_default=True, help="Answers to one request."
        ),
        click.Option(
            ["--max-body"], type=click.IntRange(1024), default=2**20, show_default=True, help="Bytes of a request."
        ),
        click.Option(
            ["--max-loaded"],
            type=click.IntRange(1),
            default=64,
            show_default=True,
            help="Adapters in memory; the others wait on disk.",
        ),
        click.Option(
            ["--stop-after"],
            type=click.FloatRange(0),
            default=30.0,
            show_default=True,
            help="Seconds that answers have to finish when it is stopped.",
        ),
        click.Option(["--use-cpu"], is_flag=True, help="Do not use a GPU even if there is one."),
    ],
)
