"""`coadapt` itself: finds the verbs, and turns errors into one message and an exit code."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

VERBS = {
    "demo": "Adapt a tiny model in a minute: offline, on the CPU.",
    "estimate": "What a training will need, before anything is loaded.",
    "data": "Look at your data before it is trained on.",
    "train": "Train adapters on your data.",
    "compare": "Compare methods and mixes on your data, under equal budgets.",
    "search": "Find the best combination of methods, sites, ranks and rates.",
    "generate": "Ask a model with its adapter.",
    "chat": "Talk to a model with its adapters.",
    "serve": "Serve a base and many adapters, as OpenAI's API.",
    "ui": "A page in the browser: train, watch, chat, compare.",
    "eval": "Score a base and its adapters side by side, on rows.",
    "compat": "Which programs load an adapter, and what mends a no.",
    "merge": "Put an adapter into the weights of its base.",
    "verify": "Try one step with an adapter: does everything train?",
    "combine": "Make one adapter out of several.",
    "export": "Write an adapter for vLLM, llama.cpp, Ollama, MLX, ONNX …",
    "convert": "Read an adapter of another program, and write it for a third.",
    "card": "Write the model card of an adapter folder.",
    "push": "Put an adapter, with its card, on a model hub.",
    "show": "What an adapter folder, or a model, is made of.",
    "doctor": "What this machine has, and what of it works.",
    "completion": "The script that lets a shell complete coadapt.",
}
"""Verb -> the first line of its help; each verb is a file here, imported when it is used."""

DEBUG = "COADAPT_DEBUG"


class Verbs(click.Group):
    """A group that imports a verb only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"coadapt.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from difflib import get_close_matches

        if args and args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(args[0], VERBS)
            hint = f" Did you mean {near[0]}?" if near else ""
            ctx.fail(f"There is no verb {args[0]!r}.{hint} There are: {', '.join(VERBS)}.")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, param: click.Parameter, asked: bool) -> None:
    if asked:
        click.echo(f"coadapt {importlib.import_module('coadapt').__version__}")
        ctx.exit()


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.option("--debug", is_flag=True, help=f"Show the whole traceback of an error (or set {DEBUG}=1).")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def group(debug: bool) -> None:
    """Parameter-efficient fine-tuning: any mix of adapters on one frozen model.

    Begin with `coadapt demo`.
    """
    if debug:
        os.environ[DEBUG] = "1"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Exits with 0 (done), 1 (it failed) or 2 (it was called wrongly)."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    try:
        return int(group.main(args=args, prog_name="coadapt", standalone_mode=False) or 0)
    except click.ClickException as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes that are called alike, the first
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _say("stopped")
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123  who read us has gone; the interpreter flushes at exit
        return 1
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        return _say(describe(error))


def describe(error: Exception) -> str:
    """What a person is told of an error; one that is nobody's input is told to be a mistake of ours."""
    if isinstance(error, ImportError) and (reason := importlib.import_module("coadapt.versions").explain(error)):
        return f"{reason}\n(coadapt doctor looks at everything)"
    if isinstance(error, ValueError | OSError | TypeError | RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error}\n(this looks like a mistake in coadapt; {DEBUG}=1 shows where)"


def _say(message: str) -> int:
    click.echo(f"error: {message}", err=True)
    return 1
