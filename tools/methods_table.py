"""Writes the table of methods into README.md, from the methods themselves: `python tools/methods_table.py`."""

import re
import sys
from pathlib import Path

from coadapt.core.adapter import ModuleCopy
from coadapt.core.method import METHODS, AttentionMethod, InputMethod, Method, WeightMethod
from coadapt.methods import CONFIGS

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- methods: made by tools/methods_table.py -->", "<!-- /methods -->"


OPTIONS = {"DORA": "use_dora=True", "COFT": "coft=True", "BAT": 'init_weights="bat"'}
"""What asks for a method that has no configuration of its own."""


def place(method: type[Method]) -> str:
    """Which kind of call a method stands around."""
    kinds = {WeightMethod: "layers", AttentionMethod: "attention", InputMethod: "the input"}
    return next((where for kind, where in kinds.items() if issubclass(method, kind)), "blocks, modules")


def configuration(name: str) -> str:
    """What builds a method, as one writes it."""
    config = METHODS[name].config_class.__name__
    return f"`{config}`" if name in CONFIGS else f"`{config}({OPTIONS[name]})`"


def row(name: str) -> str:
    """One line of the table."""
    method = METHODS[name]
    first, _, rest = (method.__doc__ or "").strip().partition("\n")
    cost = re.search(r"Parameters per site: (.+?)\.\s*$", rest, re.S)
    papers = ", ".join(f"[{i}](https://arxiv.org/abs/{i})" for i in re.findall(r"arXiv:(\d{4}\.\d{5})", rest))
    merges = "yes" if issubclass(method, WeightMethod | ModuleCopy) else "no"
    cells = [
        configuration(name),
        f"`{first}`",
        place(method),
        " ".join(cost[1].split()) if cost else "",
        merges,
        papers,
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All methods, by name."""
    head = "| configuration | what it does | where | parameters per site | merges | papers |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(row(name) for name in sorted(METHODS))])


def written(text: str) -> str:
    """README's text with the table of now."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    now = written(README.read_text("utf-8"))
    sys.stdout.write("README.md is up to date.\n" if now == README.read_text("utf-8") else "README.md was rewritten.\n")
    README.write_text(now, "utf-8")
