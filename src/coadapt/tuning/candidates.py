"""The methods and mixes that are compared, each as the settings of a run. Importing this file imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from coadapt.training.options import method_named, methods
from coadapt.training.settings import RunConfig, explain
from coadapt.training.vocabulary import refuse_unknown, renamed

NOT_HERE: Mapping[str, str] = {
    "datasets": "it trains on one data set: give data",
    "mixing_temperature": "it trains on one data set",
    "method": "the methods are listed in methods",
    "adapters": "say them inside of a candidate, as in candidates: {NAME: {adapters: ...}}",
    "composition": "say it inside of a candidate, as in candidates: {NAME: {composition: ...}}",
    "output_dir": "the folder is called out",
    "resume": "the same command goes on by itself",
    "fsdp": "candidates are trained in one process",
    "device_map": "candidates are trained on one device",
    "max_memory": "candidates are trained on one device",
    "overwrite_output_dir": "take the folder away, or choose another",
}
"""Settings of one run that have no meaning for many."""
OF_A_CANDIDATE = frozenset({"method", "adapters", "composition", "learning_rate", "gates_learning_rate"})
"""What a candidate may say by itself, beside the options of its methods."""


def candidates_of(
    settings: Mapping[str, Any], names: Iterable[str], named: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, RunConfig]:
    """Name -> its run, for the methods and mixes of `names` (`lora`, `lora+prompt`) and those that `named` describes.

    An option of a method (`r`, `num_virtual_tokens`) goes to every candidate that reads it.

    Raises:
        ValueError: an unknown method, a setting that has no meaning or no effect, or values that do not fit.
    """
    common = renamed(settings)
    for name in NOT_HERE.keys() & common.keys():
        raise ValueError(f"{name} has no meaning here: {NOT_HERE[name]}.")
    known = {option for method in methods().values() for option in method.names()} - set(RunConfig.model_fields)
    refuse_unknown(common, [*RunConfig.model_fields, *known], "a run")
    options = {name: common.pop(name) for name in sorted(known & set(common))}
    described: dict[str, dict[str, Any]] = {}
    for name in map(_plain, names):
        if name in described:
            raise ValueError(f"methods names {name} twice.")
        described[name] = {"method": name}
    for name, own in (named or {}).items():
        if name in described:
            raise ValueError(f"candidates.{name} is a name that methods has already: choose another.")
        described[_checked(name)] = _own(name, own, known)
    if len(described) < 1:
        raise ValueError("methods is missing: what to compare, as in lora,prompt,lora+prompt.")
    _refuse_unread(options, described)
    return {name: _run(name, common, options, own) for name, own in described.items()}


def _plain(name: str) -> str:
    """`lora + prompt` as `lora+prompt`; raises a ValueError for what is no method."""
    words = [word.strip() for word in name.split("+")]
    for word in words:
        method_named(word)
    return "+".join(words)


def _checked(name: str) -> str:
    """A candidate's name is that of a folder too."""
    if not name or not all(sign.isalnum() or sign in "+-_." for sign in name) or name.startswith("."):
        raise ValueError(
            f"candidates: {name!r} is no name of letters, digits and + - _ . that begins with none of them."
        )
    return name


def _own(name: str, own: Any, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(own, Mapping):
        raise ValueError(f"candidates.{name} is described by settings such as {{method: lora, r: 4}}; got {own!r}.")
    found = renamed(own)
    refuse_unknown(found, [*OF_A_CANDIDATE, *known], f"a candidate ({name})")
    return found


def _readers(own: Mapping[str, Any]) -> list[str]:
    """The methods that the options beside a candidate go to; none where it names its adapters, which have their own."""
    return [] if "adapters" in own else str(own.get("method") or "lora").split("+")


def _reads(own: Mapping[str, Any], option: str) -> bool:
    return any(option in method_named(word).names() for word in _readers(own))


def _refuse_unread(options: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]]) -> None:
    for option in options:
        if not any(_reads(own, option) for own in described.values()):
            readers = [m.name for m in methods().values() if option in m.names()]
            raise ValueError(
                f"{option} is read by none of {', '.join(described)}, but by {', '.join(readers)}. Leave it out, or "
                "add one of these."
            )


def _run(name: str, common: Mapping[str, Any], options: Mapping[str, Any], own: Mapping[str, Any]) -> RunConfig:
    read = {option: value for option, value in options.items() if option not in own and _reads(own, option)}
    try:
        return RunConfig(**{**common, **read, **own})
    except ValidationError as error:
        raise ValueError(f"{name}: {explain(error)}") from error
