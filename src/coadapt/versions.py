"""Which versions coadapt works with, which are known not to work, and what mends it. Loads nothing heavy."""

import functools
import platform
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

State = Literal["ok", "absent", "warning", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    part: str
    """What it belongs to: versions, devices, precision …"""
    name: str
    state: State
    """`absent`: not there, and not needed. `warning`: wrong, and not needed. `broken`: wrong, and needed."""
    said: str
    mend: str | None = None
    """The command, or the thing to do, that mends it or adds what is absent."""


OPTIONAL: Mapping[str, str] = {
    "trl": "pip install trl",
    "bitsandbytes": "pip install bitsandbytes",
    "torchao": "pip install torchao",
    "optimum-quanto": "pip install optimum-quanto",
    "hqq": "pip install hqq",
    "gptqmodel": "pip install gptqmodel --no-build-isolation",
    "tensorboard": "pip install tensorboard",
    "deepspeed": "pip install deepspeed",
    "flash-attn": "pip install flash-attn --no-build-isolation",
    "liger-kernel": "pip install liger-kernel",
    "optuna": "pip install optuna",
    "gguf": "pip install gguf",
    "onnx": "pip install onnx",
    "onnxruntime": "pip install onnxruntime",
    "onnxscript": "pip install onnxscript",
}
"""Parts that coadapt works with where they are there -> the command that installs each."""

KNOWN_BAD: Mapping[str, Mapping[str, str]] = {
    "trl": {
        "<0.29": "it takes every optional package for installed with transformers 5, "
        "whose _is_package_available gives a pair in place of a truth value",
    },
    "bitsandbytes": {
        "<=0.45.0": "it imports triton.ops, which triton has no more since version 3.2 (that of torch 2.6)",
    },
}
"""Name -> versions that are known not to work -> why. Lower bounds are not here: they are pyproject.toml's."""


# ---- what coadapt asks for, as pyproject.toml says it ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What the project declares, from its source tree or as it is installed."""

    python: SpecifierSet
    needed: tuple[Requirement, ...]
    extras: Mapping[str, tuple[Requirement, ...]]


@functools.cache
def declared() -> Declared:
    """What pyproject.toml declares; nothing where coadapt is neither installed nor in its source tree."""
    source = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(source.read_text("utf-8")).get("project", {}) if source.is_file() else {}
    if project.get("name") == "coadapt":
        extras = project.get("optional-dependencies", {})
        return Declared(
            python=SpecifierSet(project["requires-python"]),
            needed=tuple(map(Requirement, project["dependencies"])),
            extras={name: tuple(map(Requirement, lines)) for name, lines in extras.items()},
        )
    try:
        installed = metadata.metadata("coadapt")
    except metadata.PackageNotFoundError:
        return Declared(python=SpecifierSet(), needed=(), extras={})
    lines = [Requirement(line) for line in installed.get_all("Requires-Dist") or []]
    return Declared(
        python=SpecifierSet((installed.get_all("Requires-Python") or [""])[0]),
        needed=tuple(r for r in lines if _applies(r)),
        extras={
            name: tuple(r for r in lines if not _applies(r) and _applies(r, name))
            for name in installed.get_all("Provides-Extra") or []
        },
    )


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def found(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(version: str, wanted: SpecifierSet | str) -> bool:
    """Whether a version is in a range. A preview of a release (2.9.0a0+build) counts as that release."""
    try:
        return SpecifierSet(str(wanted)).contains(Version(version).base_version, prereleases=True)
    except InvalidVersion:  # a build of one's own, under a name of one's own
        return True


# ---- what of it is wrong here ----------------------------------------------------------------------------------------


def wrong(name: str, wanted: SpecifierSet | str = "") -> str | None:
    """Why the installed version of `name` does not work; None where nothing speaks against it, or none is there."""
    if (version := found(name)) is None:
        return None
    if not fits(version, wanted):
        return f"{name} {version} is installed; coadapt needs {name}{wanted}."
    for bad, why in KNOWN_BAD.get(name, {}).items():
        if fits(version, bad):
            return f"{name} {version} is installed, which does not work: {why}."
    return None


def upgrade(name: str, wanted: SpecifierSet | str = "") -> str:
    """The command that brings a version that works."""
    return f"pip install -U '{name}{wanted}'"


@functools.cache
def require(*optional: str) -> None:
    """Checks the versions of what coadapt needs, and of these optional parts. Costs milliseconds, and that once.

    Raises:
        ImportError: one is known not to work: tells which is there, which is needed, and the command that mends it.
    """
    bounds = {requirement.name: requirement.specifier for requirement in declared().needed}
    for name in (*bounds, *optional):
        wanted = bounds.get(name, SpecifierSet())
        if (why := wrong(name, wanted)) is not None:
            raise ImportError(f"{why} Mend it with: {upgrade(name, wanted)}")


def need(purpose: str, *names: str) -> None:
    """Raises ValueError with the command where one of these optional parts is missing: "GGUF files" need them, say."""
    if missing := [name for name in names if found(name) is None]:
        are = "are" if len(missing) > 1 else "is"
        raise ValueError(
            f"{purpose} need {' and '.join(missing)}, which {are} not installed. Run: pip install {' '.join(missing)}"
        )
    require(*names)


def explain(error: ImportError) -> str | None:
    """Why the import of something installed failed; None where it is coadapt's own."""
    try:
        require()
    except ImportError as wrong_version:
        return str(wrong_version)
    missing = [str(requirement) for requirement in declared().needed if found(requirement.name) is None]
    first = cause(error)
    if not missing:
        return None if (getattr(first, "name", None) or "").startswith("coadapt") else str(first)
    return f"{first}. Not installed, but needed: {', '.join(missing)}. Mend it with: pip install coadapt"


def cause(error: BaseException) -> BaseException:
    """What an error goes back to: transformers tells of a missing library only there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def check() -> Iterator[Finding]:
    """All versions: Python's, those of what is needed, those of optional parts, and what these ask of one another."""
    if declared().needed:
        python = platform.python_version()
        good = fits(python, declared().python)
        mend = None if good else f"make an environment with Python {declared().python}"
        yield Finding(part="versions", name="python", state="ok" if good else "broken", said=python, mend=mend)
    else:
        mend = "pip install coadapt"
        said = "coadapt is not installed, so what it needs is not known"
        yield Finding(part="versions", name="coadapt", state="warning", said=said, mend=mend)
    told = [_needed(requirement.name, requirement.specifier) for requirement in declared().needed]
    told += [_optional(name, command) for name, command in OPTIONAL.items()]
    yield from told
    yield from _among_one_another({finding.name: finding.state for finding in told})


def _needed(name: str, wanted: SpecifierSet) -> Finding:
    if (version := found(name)) is None:
        said = f"not installed; coadapt needs {name}{wanted}"
        return Finding(part="versions", name=name, state="broken", said=said, mend=f"pip install '{name}{wanted}'")
    if (why := wrong(name, wanted)) is not None:
        return Finding(part="versions", name=name, state="broken", said=why, mend=upgrade(name, wanted))
    return Finding(part="versions", name=name, state="ok", said=version)


def _optional(name: str, command: str) -> Finding:
    part = "optional parts"
    if (version := found(name)) is None:
        return Finding(part=part, name=name, state="absent", said="not installed", mend=command)
    asked = [r.specifier for requirements in declared().extras.values() for r in requirements if r.name == name]
    wanted = asked[0] if asked else SpecifierSet()
    if (why := wrong(name, wanted)) is not None:
        return Finding(part=part, name=name, state="warning", said=why, mend=upgrade(name, wanted))
    return Finding(part=part, name=name, state="ok", said=version)


def _among_one_another(told: Mapping[str, State]) -> Iterator[Finding]:
    """What the installed parts ask of one another and do not get, less what is told already."""
    needed = {requirement.name for requirement in declared().needed}
    for name in told:
        if found(name) is None:
            continue
        for line in metadata.requires(name) or []:
            asked = Requirement(line)
            if not _applies(asked) or told.get(asked.name, "ok") != "ok":
                continue
            there = found(asked.name)
            if there is not None and fits(there, asked.specifier):
                continue
            said = f"{name} {found(name)} asks for {re.sub(';.*', '', line)}; " + (
                "it is not installed" if there is None else f"{there} is installed"
            )
            state: State = "broken" if name in needed else "warning"
            mend = upgrade(asked.name, asked.specifier)
            yield Finding(part="versions", name=asked.name, state=state, said=said, mend=mend)
