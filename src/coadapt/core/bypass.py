"""Layers at which an adapter would never run, or not always: others read their weights without calling them."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence

from torch import nn

from .site import plain_class
from .tied import weights

_FACTS = frozenset({"dtype", "device", "shape", "size", "ndim", "dim", "is_meta", "requires_grad", "numel", "new"})
"""What code may ask of a weight without using its values."""
_ELSEWHERE = (
    *("__init__", "_init", "init", "reset_", "tie", "_tie", "set_", "get_", "resize", "load", "_load", "from_"),
    "fuse_",  # layers into one, once and for all (diffusers)
)
"""Beginnings of the names of functions that no forward calls."""


def bypassed(base: nn.Module) -> dict[str, str]:
    """The modules at which an adapter would never be called, by path, and why."""
    found: dict[str, str] = {}
    above: dict[str, str] = {}
    """Why nothing inside of a module is called."""
    for path, module in base.named_modules():
        parent = path.rpartition(".")[0]
        if parent in above:
            found[path] = above[path] = above[parent]
        if path and isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            above[path] = f"{path} ({type(module).__name__}) uses the weights of its layers without calling them"
        cls = plain_class(type(module))
        for child, where, flags in _read_by(cls):
            if isinstance(getattr(module, child, None), nn.Module) and all(getattr(module, f, True) for f in flags):
                own = f"{path}.{child}" if path else child
                found[own] = f"{cls.__name__}.{where} reads its weight without calling it"
    for path, tied in holders(base).items():
        found[path] = f"it only holds the weight of {' and '.join(tied)} and is never called; adapt those"
    return found


def holders(base: nn.Module) -> dict[str, list[str]]:
    """Embeddings that only hold the weight of others (T5's `shared`), and the paths of those."""
    found: dict[str, list[str]] = {}
    embeddings = {p: m for p, m in base.named_modules() if isinstance(m, nn.Embedding)}
    for path, module in embeddings.items():
        if path.rpartition(".")[2] == "shared":
            weight = weights(base, list(embeddings.values()))
            tied = [p for p, m in embeddings.items() if m is not module and weight[m] is weight[module]]
            found |= {path: tied} if tied else {}
    return found


Read = tuple[str, str, frozenset[str]]
"""An attribute whose `weight` is used, the function that does, and attributes that are true where it comes there."""


@functools.cache
def _read_by(cls: type[nn.Module]) -> Sequence[Read]:
    """What the code of a class uses of its parts without calling them."""
    found: list[Read] = []
    for owner in cls.__mro__:
        if owner.__module__.startswith(
            ("torch.", "builtins", "transformers.modeling_utils", "transformers.generation")
        ):
            continue
        for name, made in vars(owner).items():
            function = inspect.unwrap(made) if inspect.isfunction(made) else None
            if function is None or name.startswith(_ELSEWHERE) or "weight" not in function.__code__.co_names:
                continue
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):  # made in a console, or by a program
                continue
            found += [(child, name, flags) for child, flags in _reads(tree, _harmless(tree), frozenset())]
    return found


def _harmless(tree: ast.AST) -> set[int]:
    """The places where a weight is looked at, and its values are not used."""
    found: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Attribute(attr="weight") as weight, attr=fact) if fact in _FACTS:
                found.add(id(weight))
            case ast.Call(func=ast.Name(id="isinstance" | "hasattr" | "getattr" | "id")):
                found |= {id(argument) for argument in node.args}
            case ast.Compare():
                found |= {id(part) for part in (node.left, *node.comparators)}
            case ast.Attribute(attr="weight", ctx=ast.Store()):
                found.add(id(node))
            case _:
                pass
    return found


def _reads(node: ast.AST, harmless: set[int], flags: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """The X of each `self.X.weight` that is used for its values, with the Y of each `if self.Y` around it."""
    match node:
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr=name), attr="weight"):
            if id(node) not in harmless:
                yield name, flags
        case ast.If():
            parts = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
            conjunct = not isinstance(node.test, ast.BoolOp) or isinstance(node.test.op, ast.And)
            more = {p.attr for p in parts if isinstance(p, ast.Attribute) and conjunct} - {"training"}
            for child in node.body:
                yield from _reads(child, harmless, flags | more)
            for child in (node.test, *node.orelse):
                yield from _reads(child, harmless, flags)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _reads(child, harmless, flags)
