"""The options of configurations as their source declares them: read, not imported, so that help texts need no torch."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a configuration class, as its source declares it."""

    name: str
    annotation: str
    default: str
    """As its source says it; empty where there is none, so that it has to be given."""
    doc: str


def declared_options(source: str) -> dict[str, list[Option]]:
    """The configuration classes in a Python source text: class name -> fields with the text under each."""
    return {
        node.name: list(_options(node))
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    }


def _options(node: ast.ClassDef) -> Iterable[Option]:
    for declared, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(declared, ast.AnnAssign) or "ClassVar" in (kind := ast.unparse(declared.annotation)):
            continue
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        default = "" if declared.value is None else ast.unparse(declared.value)
        yield Option(
            name=ast.unparse(declared.target), annotation=kind, default=default, doc=" ".join(str(text).split())
        )
