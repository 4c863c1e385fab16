"""What the form of a training means: settings as `coadapt train` has them, its YAML, its command, or what is wrong."""

import re
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from coadapt.training.options import method_named, methods
from coadapt.training.recommended import RECOMMENDED
from coadapt.training.settings import PlannedRun, RunConfig, explain
from coadapt.training.vocabulary import SettingHint, override

SETTINGS = "settings.yaml"
"""What a run of the page begins with, in its folder; `run.yaml` beside it is training's own, defaults and all."""
FIELDS = (
    *("model", "data", "eval_data", "composition", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("max_length", "logging_steps", "eval_steps", "seed", "load_in_4bit", "gradient_checkpointing", "use_cpu"),
)
"""Settings of a run that have a place of their own in the form; the others go into `more`."""
SIZES = ("r", "num_virtual_tokens", "adapter_len", "reduction_factor", "rank", "n_frequency", "boft_block_size")
"""The option that says how large an adapter is: the first of them that its method has."""
SHORT = {"prompt_tuning": "prompt", "prefix_tuning": "prefix"}
RUN_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]{0,127}")

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class AdapterForm:
    """One adapter, as it is written in the form."""

    method: str
    name: str = ""
    size: str = ""
    learning_rate: str = ""
    more: str = ""
    """Other options, `name=value`, as on the command line."""


def size_option(method: str) -> str | None:
    """The option of a method that says how large it is; None where no one option does."""
    known = method_named(method).names()
    return next((name for name in SIZES if name in known), None)


def default_size(method: str) -> str:
    """What that option is where nothing is said."""
    known = method_named(method)
    name = size_option(method)
    chosen = RECOMMENDED.get(known.name)
    if chosen is not None and name is not None and name in chosen.options:
        return str(chosen.options[name])
    defaults = [o.default for o in (*known.own, *known.inherited) if o.name == name]
    return defaults[0] if defaults and defaults[0] != "None" else ""


def choices() -> list[str]:
    """The methods of the form, the usual ones first."""
    usual = ["lora", "prompt_tuning", "prefix_tuning", "bottleneck", "ia3", "dora", "p_tuning", "bitfit"]
    return [*usual, *sorted(set(methods()) - {*usual, "xlora"})]


def adapters(forms: Iterable[AdapterForm]) -> dict[str, Values]:
    """The adapters by name; one without a name is called after its method.

    Raises:
        ValueError: two have one name, or an option is none.
    """
    found: dict[str, Values] = {}
    for form in forms:
        name = form.name.strip() or _free(SHORT.get(form.method, form.method), found, "{}{}")
        if name in found:
            raise ValueError(f"adapters: two are called {name!r}. Give each a name of its own.")
        values: Values = {"method": form.method}
        if form.size.strip() and (option := size_option(form.method)):
            values[option] = _number(form.size)
        if form.learning_rate.strip():
            values["learning_rate"] = _number(form.learning_rate)
        for setting in words(form.more):
            override(values, setting)
        found[name] = values
    return found


def words(text: str) -> list[str]:
    """`name=value` by lines and spaces, quoted as in a shell. Raises ValueError for a quote that does not end."""
    try:
        return shlex.split(text, comments=True)
    except ValueError as error:
        raise ValueError(f"{text!r} has a quote that does not end ({error}).") from error


def settings(values: Mapping[str, Any], forms: Sequence[AdapterForm]) -> Values:
    """The settings that the form says, as YAML has them; what was left blank is left out.

    Args:
        values: `FIELDS` by name, as text, and `more`: other settings as `name=value`.

    Raises:
        ValueError: an adapter, or `more`, cannot be read.
    """
    given = {n: _number(v) for n in FIELDS if (v := values.get(n)) not in (None, "", False) and str(v).strip()}
    before = {n: v for n, v in given.items() if n in ("model", "data", "eval_data")}
    found: Values = {**before, "adapters": adapters(forms), **{n: v for n, v in given.items() if n not in before}}
    for setting in words(str(values.get("more") or "")):
        override(found, setting)
    return found


def _number(text: Any) -> Any:
    """A number where it is one; everything else as it is, for the settings themselves to complain of."""
    if not isinstance(text, str):
        return text
    word = text.strip()
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def planned(values: Mapping[str, Any]) -> RunConfig:
    """The run, whose data may be left open.

    Raises:
        ValueError: something does not fit, in the command line's own words, a line each.
    """
    return _built(PlannedRun, values)


def checked(values: Mapping[str, Any]) -> RunConfig:
    """The run as `coadapt train` reads it. Raises ValueError as `planned` does, and where data is missing."""
    return _built(RunConfig, values)


def _built(kind: type[RunConfig], values: Mapping[str, Any]) -> RunConfig:
    from coadapt.training.assemble import adapter_config
    from coadapt.training.timetable import timetable

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SettingHint)  # another program's name for a setting is as good here
        try:
            run = kind(**values)
        except ValidationError as error:
            raise ValueError(explain(error)) from error
    timetable(run)
    for name, adapter in run.adapters.items():
        adapter_config(name, adapter, run.task or "causal-lm")
    return run


def run_name(name: str, values: Mapping[str, Any], runs: Path) -> str:
    """The name of a run's folder: the one that was given, or one after model and adapters that is free.

    Raises:
        ValueError: it cannot be the name of a folder below `runs`, or something is there already.
    """
    if given := name.strip():
        if not RUN_NAME.fullmatch(given):
            raise ValueError(
                f"The run's name {given!r} is also that of its folder: letters, digits, '_', '-', '+' and '.', not "
                "starting with '.', '-' or '+'."
            )
        if (runs / given).exists():
            raise ValueError(f"{runs / given} is there already. Choose another name.")
        return given
    words = [Path(str(values.get("model") or "run")).name, *values.get("adapters", {})]
    base = re.sub(r"[^\w.+-]", "-", f"{words[0]}-{'+'.join(words[1:])}").lstrip(".-+") or "run"
    return _free(base[:100], {path.name for path in runs.iterdir()} if runs.is_dir() else (), "{}-{}")


def _free(name: str, taken: Iterable[str], numbered: str) -> str:
    there = set(taken)
    number = 2
    found = name
    while found in there:
        found, number = numbered.format(name, number), number + 1
    return found


def as_yaml(values: Mapping[str, Any]) -> str:
    """The file that the run is started with."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=False)


def command(folder: Path) -> str:
    """The command that a run in `folder` is started with."""
    return shlex.join(["coadapt", "train", "--config", str(folder / SETTINGS)])
