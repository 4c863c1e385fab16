"""Writes docs/api/configs.md, every configuration with its fields, from their sources: python tools/configs_page.py"""

import importlib
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import coadapt
from coadapt.config import PeftConfig
from coadapt.declared import Option, declared_options

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api" / "configs.md"
PACKAGE = ROOT / "src" / "coadapt"
HEAD = """# Configurations

Made from the sources by `tools/configs_page.py`. Each is a frozen dataclass that takes its options by name:
`LoraConfig(r=16, lora_alpha=32)`. The names, and the defaults, are those of `adapter_config.json` in the field; an
option that would do nothing is an error, and so is one that a method does not have. What each method computes, and when
to use it, is in [the methods](../methods.md); the same options on the command line are in [the
commands](../commands.md). An option without a default must be given.
"""


def options() -> dict[str, list[Option]]:
    """Class -> the fields that it declares itself."""
    found: dict[str, list[Option]] = {}
    for file in (PACKAGE / "config.py", PACKAGE / "lora_options.py", *sorted((PACKAGE / "methods").glob("*.py"))):
        found |= declared_options(file.read_text("utf-8"))
    return found


def shared() -> dict[str, type]:
    """The classes that say once what several methods have, the most general first."""
    config = importlib.import_module("coadapt.config")
    return {
        name: kind
        for name, kind in vars(config).items()
        if name.endswith("Config") and kind.__module__ == config.__name__
    }


def public() -> dict[str, type]:
    """The configurations that a user makes: of methods, then of options within them."""
    names = [name for name in coadapt.__all__ if name.endswith("Config") and name != "PeftConfig"]
    kinds = {name: getattr(coadapt, name) for name in names}
    return dict(sorted(kinds.items(), key=lambda item: (not issubclass(item[1], PeftConfig), item[0].lower())))


def section(kind: type, own: list[Option], known: dict[str, list[Option]]) -> str:
    """What the page says of one class."""
    doc = re.sub(r"\s*Raises:.*", "", (kind.__doc__ or "").strip(), flags=re.DOTALL)
    lines = [f"### {kind.__name__}", "", "\n".join(line.strip() for line in doc.splitlines()), ""]
    others = [base.__name__ for base in kind.__mro__[1:] if known.get(base.__name__)]
    if own:
        declared = {found.name: found for found in fields(kind)}
        lines += ["| option and default | |", "|---|---|"]
        lines += [
            f"| `{cell(o.name + default(declared[o.name]))}` | {cell(o.doc)} `{cell(o.annotation)}` |" for o in own
        ]
        lines.append("")
    if others:
        lines.append("And the options of " + ", ".join(f"[{name}](#{name.lower()})" for name in others) + ".\n")
    return "\n".join(lines)


def default(option: Field[Any]) -> str:
    """What stands in a field that is left out; nothing where it must be given."""
    if option.default_factory is not MISSING:
        return f" = {option.default_factory()!r}"
    return "" if option.default is MISSING else f" = {option.default!r}"


def cell(text: str) -> str:
    """Text that may stand in a table."""
    words = text.replace("|", "\\|").split("`")
    return "`".join(word if number % 2 else word.replace("<", "&lt;") for number, word in enumerate(words))


def page() -> str:
    """The whole of it."""
    known = options()
    methods = {name: kind for name, kind in public().items() if issubclass(kind, PeftConfig)}
    within = {name: kind for name, kind in public().items() if name not in methods}
    chapters = (
        ("What all methods have, and what several have", shared()),
        ("One for each method", methods),
        ("Options of a LoRA that have options of their own", within),
    )
    parts = [HEAD]
    for title, kinds in chapters:
        parts.append(f"## {title}\n")
        parts += [section(kind, known.get(name, []), known) for name, kind in kinds.items()]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
