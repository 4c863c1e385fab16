"""The methods' options and this project's defaults for them, known without importing torch."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from coadapt.config import did_you_mean
from coadapt.declared import Option, declared_options
from coadapt.training.recommended import MEASURED, OTHERS, RECOMMENDED, SMALL

NOT_CHOSEN = frozenset(
    {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "adapter_name"}
)
"""Fields of configurations that a run fills in by itself."""

SHORT_NAMES = {"prompt": "prompt_tuning", "prefix": "prefix_tuning", "adapter": "bottleneck", "ptuning": "p_tuning"}
"""What people call some methods."""

FORMS: Mapping[str, tuple[str, str]] = {"dora": ("lora", "use_dora")}
"""Methods that are another one with an option switched on."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """A method as its source declares it."""

    name: str
    own: tuple[Option, ...]
    inherited: tuple[Option, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Options that the name itself sets."""

    @property
    def kind(self) -> str:
        """The `peft_type` of its configuration."""
        return FORMS.get(self.name, (self.name, ""))[0].upper()

    def names(self) -> list[str]:
        """All options that a run may set."""
        return [o.name for o in (*self.own, *self.inherited)]


CLASS = re.compile(r"^class (\w+Config)\(([\w, ]+)\):(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
KIND = re.compile(r'^    kind\b.*= "(\w+)"$', re.MULTILINE)


@cache
def methods() -> dict[str, MethodOptions]:
    """Method name (`lora`, `prompt_tuning` …) -> its options, read from the sources of `coadapt.methods`."""
    spec = importlib.util.find_spec("coadapt")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    bases: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    options: dict[str, list[Option]] = {}
    for file in (root / "config.py", *sorted((root / "methods").glob("*.py"))):
        source = file.read_text("utf-8")
        options |= declared_options(source)
        for name, base, body in CLASS.findall(source):
            bases[name] = base.split(", ")
            kinds |= {kind.lower(): name for kind in KIND.findall(body)}
    found = {
        kind: MethodOptions(name=kind, own=tuple(options[name]), inherited=_inherited(name, bases, options))
        for kind, name in kinds.items()
    }
    for form, (kind, switch) in FORMS.items():
        own = tuple(option for option in found[kind].own if option.name != switch)
        found[form] = replace(found[kind], name=form, own=own, fixed={switch: True})
    return found


def method_named(word: str) -> MethodOptions:
    """The method called `word` in any of the usual spellings.

    Raises:
        ValueError: there is none; the nearest name is told.
    """
    name = word.strip().lower().replace("-", "_")
    name = SHORT_NAMES.get(name, name)
    if name not in methods():
        known = [*methods(), *SHORT_NAMES]
        raise ValueError(f"method={word!r} is unknown.{did_you_mean(name, known)} Known: {', '.join(methods())}.")
    return methods()[name]


def tasks_option(method: str) -> str | None:
    """The option of a method that says how many tasks it tells apart; None where it does not tell any apart."""
    known = method_named(method).names()
    return next((name for name in ("n_tasks", "num_tasks") if name in known), None)


def check_needed(who: str, method: MethodOptions, given: Mapping[str, Any]) -> None:
    """Raises a ValueError where an option is missing that has no default, or the method is no adapter of a run."""
    if method.name == "xlora":
        raise ValueError(
            f"{who}: xlora mixes LoRAs and is none itself. Name those as the run's adapters, and how they are mixed as "
            "its composition: 'xlora_router(a, b, hidden_size=N)' (docs/routing.md)."
        )
    every = {option.name: option for option in (*method.inherited, *method.own)}
    if missing := [o for o in every.values() if not o.default and o.name not in {*given, *method.fixed}]:
        needed = ", ".join(f"{o.name} ({o.doc.rstrip('.')})" for o in missing)
        flags = " ".join(f"--{o.name.replace('_', '-')} VALUE" for o in missing)
        raise ValueError(f"{who}: {method.name} does not go without {needed}. On the command line: {flags}.")


def default_options(method: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The starting values that `chosen` leaves open, but for the learning rate, which asks for the base's size."""
    known = method_named(method)
    defaults = RECOMMENDED.get(known.name, OTHERS)
    values = dict(defaults.options)
    if defaults.weight_decay is not None:
        values["weight_decay"] = defaults.weight_decay
    if known.kind == "LORA":
        # The usual ratio: a rank that is changed alone keeps the size of the first step.
        values["lora_alpha"] = 2 * int(chosen.get("r") or values["r"])
    return {name: value for name, value in values.items() if chosen.get(name) is None}


def default_rate(method: str, parameters: int | None = None) -> tuple[float, str]:
    """(learning rate, where it is from) for a base of so many parameters; None: a large one."""
    defaults = RECOMMENDED.get(method_named(method).name, OTHERS)
    if parameters is not None and parameters < SMALL:
        return defaults.small, MEASURED
    return defaults.learning_rate, defaults.source


def _inherited(
    name: str, bases: Mapping[str, Sequence[str]], options: Mapping[str, list[Option]]
) -> tuple[Option, ...]:
    """Those of the classes that `name` is made of, most general first; each once."""
    found: dict[str, Option] = {}
    for base in reversed(bases.get(name, ())):
        own = (option for option in options.get(base, []) if option.name not in NOT_CHOSEN)
        found |= {option.name: option for option in (*_inherited(base, bases, options), *own)}
    return tuple(found.values())
