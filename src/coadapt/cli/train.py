"""`coadapt train`: the settings of `RunConfig` as flags, from a YAML file, and as `name=value`."""

import os
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import yaml
from pydantic import ValidationError

from coadapt.cli.completion import paths, words
from coadapt.declared import Option
from coadapt.training.options import RECOMMENDED, methods
from coadapt.training.settings import RunConfig, explain
from coadapt.training.vocabulary import ALIASES, SettingHint, override, read_yaml

Made = TypeVar("Made")
PATHS = ("model", "data", "eval_data", "output_dir")
"""Settings that can be a file or a folder."""


class Setting(click.Option):
    """A flag of one setting; `section` is where the help shows it."""

    def __init__(self, name: str, section: str, **options: Any) -> None:
        flag = name.replace("_", "-")
        if name in PATHS:
            options["shell_complete"] = paths
        elif "|" in (options.get("metavar") or ""):
            options["shell_complete"] = words(options["metavar"].split("|"))
        elif name == "method":
            options["shell_complete"] = words(list(methods()))
        names = [f"--{flag}/--no-{flag}"] if options.pop("switch", False) else [f"--{flag}"]
        super().__init__([*names, name], default=None, show_default=False, **options)
        self.section = section


class TrainCommand(click.Command):
    """Its help shows the settings in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                title = parameter.section if isinstance(parameter, Setting) else "Options"
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def settings(of: Collection[str] = tuple(RunConfig.model_fields), methods_too: bool = True) -> Iterable[Setting]:
    """A flag for each setting of a run that is named, and for each option of the methods."""
    section = ""
    for name, field in RunConfig.model_fields.items():
        section = RunConfig.SECTIONS.get(name, section)
        if name in ("adapters", "datasets") or name not in of:
            continue
        default = "" if field.is_required() or field.default is None else f"  [{_shown(field.default)}]"
        switch = field.annotation is bool
        metavar = None if switch else _metavar(field.annotation)
        yield Setting(name, section, switch=switch, metavar=metavar, help=f"{field.description}{default}")
    options = {option for method in methods().values() for option in method.names()} if methods_too else set()
    for alias in (alias for alias, ours in ALIASES.items() if ours in {*of, *options}):
        yield Setting(alias, section, hidden=True, switch=ALIASES[alias] == "resume")
    seen = {*RunConfig.model_fields, *ALIASES}
    for title, own in _method_options() if methods_too else ():
        for option in own:
            if option.name not in seen:
                seen.add(option.name)
                default = _option_default(option)
                switch = option.annotation == "bool"
                metavar = None if switch else "VALUE"
                yield Setting(option.name, title, switch=switch, metavar=metavar, help=f"{option.doc}{default}")


def _method_options() -> Iterable[tuple[str, list[Option]]]:
    """Title -> options; those that several methods have come last."""
    every = [method for method in methods().values() if not method.fixed]
    owners = Counter(option.name for method in every for option in method.own)
    for method in every:
        if alone := [option for option in method.own if owners[option.name] == 1]:
            yield f"Options of {method.name}", alone
    several = [option for method in every for option in method.own if owners[option.name] > 1]
    inherited = [option for method in every for option in method.inherited]
    yield "Options of several methods", [*several, *inherited]


def _option_default(option: Option) -> str:
    """What the command line uses: this project's recommendation, else the class's default."""
    chosen = [d.options[option.name] for d in RECOMMENDED.values() if option.name in d.options]
    value = str(chosen[0]) if chosen else option.default.strip("'")
    return "" if value in ("", "None") or value.startswith("field(") else f"  [{value}]"


def _metavar(annotation: Any) -> str:
    parts = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    kinds = [part for part in parts if part is not type(None)]
    match kinds[0]:
        case kind if get_origin(kind) is Literal:
            return "|".join(map(str, get_args(kind)))
        case kind if kind in (int, float):
            return "NUMBER"
        case _:
            return "TEXT"


def _shown(value: Any) -> str:
    return (
        {True: "on", False: "off"}[value] if isinstance(value, bool) else repr(value) if value == "\n" else str(value)
    )


def read_settings(
    config: Path | None, flags: dict[str, Any], overrides: Iterable[str], kind: type[RunConfig] = RunConfig
) -> RunConfig:
    """The run that a YAML file, flags and `name=value` describe; the later goes before the earlier.

    Raises:
        click.UsageError: a setting that there is not, or a value that does not fit, all of them listed.
    """
    return built(lambda: kind(**read_values(config, flags, overrides)))


def read_values(config: Path | None, flags: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """What a YAML file, flags and `name=value` say.

    Raises:
        ValueError: the file cannot be read, or `name=value` is none.
    """
    values = read_yaml(config) if config else {}
    values |= {name: _read(name, value) for name, value in flags.items() if value is not None}
    for setting in overrides:
        override(values, setting)
    return values


def built(make: Callable[[], Made]) -> Made:
    """What `make` gives; hints are told in a line each, and what does not fit is the caller's mistake.

    Raises:
        click.UsageError: `make` raised a ValueError.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SettingHint)
            made = make()
    except ValidationError as error:
        raise click.UsageError(explain(error)) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes on a machine, the first
        for hint in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, SettingHint)):
            click.echo(f"hint: {hint}", err=True)
    return made


def _read(name: str, value: Any) -> Any:
    """Options of methods are read as YAML, as `name=value` is; pydantic reads the rest."""
    return yaml.safe_load(value) if isinstance(value, str) and name not in RunConfig.model_fields else value


def _invoke(config: Path | None, overrides: tuple[str, ...], **flags: Any) -> int:
    run = read_settings(config, flags, overrides)
    if "WORLD_SIZE" in os.environ:  # PyTorch advises against a setting that any composition but one needs
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from coadapt.cli.card import write_card_of
    from coadapt.cli.output import console, quiet
    from coadapt.training import processes
    from coadapt.training.load import asking
    from coadapt.training.run import train

    quiet()
    out = console()
    try:
        done = train(run, out)
    except processes.Elsewhere:
        return 1
    if not processes.first():
        return 1 if done.interrupted else 0
    again = f"coadapt train --config {done.folder}/run.yaml --resume"
    if done.interrupted:
        click.echo(f"\nStopped at step {done.step}; nothing is lost. Go on with:\n  {again}")
        return 1
    write_card_of(done.folder)
    click.echo(f"\nSaved in {done.folder} (adapter, README.md, loss.png, metrics.jsonl, run.yaml). Try it:")
    which = f' --adapters "{next(iter(run.sources.values())).composition}"' if len(run.datasets) > 1 else ""
    if (tasks := done.material.first.tasks) is not None:
        which += f" --task {tasks.names[tasks.number] if tasks.names else tasks.number}"
    click.echo(f"  coadapt generate --model {run.model} --adapter {done.folder}{which} {asking(done.processor)}")
    return 0


command = TrainCommand(
    "train",
    callback=_invoke,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-"), "max_content_width": 110},
    help="""Train adapters on your data.

    \b
    coadapt train --model DIR_OR_ID --data FILE --method lora
    coadapt train --model DIR_OR_ID --data FILE --method "prompt + lora" --r 8
    coadapt train --config run.yaml adapters.task.learning_rate=5e-3

    Every setting below can stand in the YAML file, be a flag, or be given as name=value (with dots into adapters and
    datasets). In YAML, `adapters` are named adapters with settings of their own, and `datasets`, in place of data,
    several data sets, each with the adapter or the composition that its rows train: docs/joint_training.md.
    """,
    params=[
        click.Argument(["overrides"], nargs=-1, metavar="[NAME=VALUE]..."),
        click.Option(
            ["--config"], type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file with settings."
        ),
        *settings(),
    ],
)
