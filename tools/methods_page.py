"""Writes docs/methods.md, and the list of methods in README.md, from the methods themselves.

`python tools/methods_page.py` writes what their sources say; with `--run` it also tries again what each can do.
"""

import re
import sys
from pathlib import Path

from coadapt.core.method import METHODS, AttentionMethod, InputMethod, Method, WeightMethod
from coadapt.methods import CONFIGS

ROOT = Path(__file__).parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "methods.md"
START, END = "<!-- methods: made by tools/methods_page.py -->", "<!-- /methods -->"
TABLE, TABLE_END = "<!-- abilities: made by tools/methods_page.py --run -->", "<!-- /abilities -->"
OPTIONS = {
    "DORA": "use_dora=True",
    "LOFTQ": 'init_lora_weights="loftq"',
    "ALORA": "alora_invocation_tokens=[...]",
    "BD_LORA": "use_bdlora={...}",
    "QA_LORA": "use_qalora=True",
    "KASA": "kasa_config={...}",
    "MONTECLORA": "monteclora_config={...}",
    "VELORA": "velora_config={...}",
    "COFT": "coft=True",
    "BAT": 'init_weights="bat"',
    "ASA": "use_asa=True",
}
"""What builds the methods that are another one with an option."""
PLACES = {
    "layers": "At layers",
    "blocks, modules": "Around blocks and other modules",
    "attention": "Inside attention",
    "the input": "In front of the input",
}


def place(method: type[Method]) -> str:
    """Which kind of call a method stands around."""
    kinds = {WeightMethod: "layers", AttentionMethod: "attention", InputMethod: "the input"}
    return next((where for kind, where in kinds.items() if issubclass(method, kind)), "blocks, modules")


def configuration(name: str) -> str:
    """What builds a method, as one writes it."""
    config = METHODS[name].config_class.__name__
    return config if name in CONFIGS else f"{config}({OPTIONS[name]})"


def parts(method: type[Method]) -> tuple[str, str, str, str]:
    """Formula, the paper and what is to be known, when to use it, parameters per site: from its docstring."""
    formula, _, rest = (method.__doc__ or "").strip().partition("\n")
    text = " ".join(rest.split())
    cost = re.search(r"Parameters\b[^.:]*: (.+?)\.?$", text)
    use = re.search(r"Use it ([^.]*(?:\.\d[^.]*)*)\.", text)
    for found in (cost, use):
        text = text.replace(found[0], "") if found else text
    linked = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", text.strip())
    return formula, linked, use[1] if use else "", cost[1] if cost else ""


def section(name: str) -> str:
    """What the page says of one method."""
    method = METHODS[name]
    formula, text, use, cost = parts(method)
    lines = [f"### {method.__name__}", "", f"`{configuration(name)}`: `{formula}`", "", text, ""]
    if isinstance(method, type) and issubclass(method, WeightMethod):
        lines.append(f"- adapts: {', '.join(method.kinds)}")
    lines += [f"- parameters per site: {cost}"] if cost else []
    lines += [f"- use it {use}"] if use else []
    return "\n".join(lines)


def by_place() -> dict[str, list[str]]:
    """Where methods stand -> their names."""
    found: dict[str, list[str]] = {where: [] for where in PLACES}
    for name in sorted(METHODS, key=lambda name: METHODS[name].__name__.lower()):
        found[place(METHODS[name])].append(name)
    return found


def listed() -> str:
    """The methods in few lines, for the README."""
    return "\n".join(
        f"- {PLACES[where].lower()}: {', '.join(METHODS[name].__name__ for name in names)}"
        for where, names in by_place().items()
    )


def page(old: str, table: str | None = None) -> str:
    """docs/methods.md, with the table of abilities that stands in `old` unless there is a new one."""
    kept = between(old, TABLE, TABLE_END) if table is None else f"\n{table}\n"
    chapters = [
        f"## {PLACES[where]}\n\n" + "\n\n".join(section(name) for name in names) for where, names in by_place().items()
    ]
    return f"{HEAD}\n{TABLE}{kept}{TABLE_END}\n\n{NOTES}\n\n" + "\n\n".join(chapters) + "\n"


HEAD = """# The methods

Made from the methods' sources by `tools/methods_page.py`. Letters: O out-features, I in-features, K kernel size, D
hidden size, r rank, N virtual tokens, H heads; W is the weight with what stands below in a composition. Where a
method does something else than in the field's library, on purpose, [differences.md](differences.md) says why. Rates
to start from: [learning_rates.md](learning_rates.md).

## What each can do

Tried by `tools/abilities.py` on small models when the table was made. All of them train beside any other in one call,
save and load, and take part in compositions.
"""
NOTES = """- *layers*: kinds of layer that it adapts, "experts" being fused ones, each a linear layer to it, and the
  matrices of routers; `-` where it stands around something else.
- *several at once*: two adapters of the method and a LoRA in one call. *rows*: each row of a batch with its own.
- *gates*: any weight; 0 is the base to the bit. *merge*: into the base's weights, and out again to the bit.
- *files of peft*: peft 0.21.2 loads the folder and computes the same.
- *as a LoRA*: `coadapt export` for programs that know only LoRA, by SVD with the measured error."""


def between(text: str, start: str, end: str) -> str:
    return text.split(start)[1].split(end)[0] if start in text else "\n"


def abilities_table() -> str:
    """Tries everything: minutes."""
    import abilities

    found = {METHODS[config.method].__name__: abilities.tried(case) for case, config in abilities.CASES.items()}
    head = ["method", *next(iter(found.values()))]
    rows = [[name, *said.values()] for name, said in sorted(found.items(), key=lambda item: item[0].lower())]
    notes = list(dict.fromkeys(cell for row in rows for cell in row[1:] if cell.startswith("no: ")))
    marked = [[f"no [{notes.index(cell) + 1}]" if cell in notes else cell for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *marked]]
    return "\n".join([*lines, "", *(f"{i + 1}. {note[4:]}" for i, note in enumerate(notes))])


def written(text: str) -> str:
    """README's text with the list of now."""
    before, rest = text.split(START)
    return f"{before}{START}\n{listed()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    made = abilities_table() if "--run" in sys.argv else None
    README.write_text(written(README.read_text("utf-8")), "utf-8")
    PAGE.write_text(page(PAGE.read_text("utf-8") if PAGE.exists() else "", made), "utf-8")
