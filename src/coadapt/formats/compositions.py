"""A composition as JSON: a name, {"seq": [...]}, or {"sum": [...], "weights": [...]}."""

import math
from typing import Any

from ..core.composition import Learned, Node, Seq, Sum, learned


def node_to_json(node: Node) -> Any:
    """`node` as plain JSON values; a learned gate is {"learned": its number in the file of gates, "value": ...}.

    Raises:
        ValueError: a gate per row, which belongs to one batch.
    """
    return _node_to_json(node, learned(node))


def _node_to_json(node: Node, gates: list[Learned]) -> Any:
    if isinstance(node, str):
        return node
    children = [_node_to_json(c, gates) for c in node.children]
    if isinstance(node, Seq):
        return {"seq": children}
    return {"sum": children, "weights": [_weight_to_json(w, gates) for w in node.weights]}


def _weight_to_json(weight: Any, gates: list[Learned]) -> Any:
    if isinstance(weight, float):
        return weight
    if isinstance(weight, Learned):
        return {"learned": gates.index(weight), "value": float(weight().detach())}
    raise ValueError("A composition with a gate per row belongs to one batch and cannot be saved.")


def node_from_json(said: Any) -> Node:
    """Undoes `node_to_json`. Learned gates start at the value that is given; their exact one is in the file of gates.

    Raises:
        ValueError: it is no composition.
    """
    return _node_from_json(said, {})


def _node_from_json(said: Any, gates: dict[int, Learned]) -> Node:
    match said:
        case str():
            return said
        case {"seq": list(children)}:
            return Seq(*[_child(c, gates) for c in children])
        case {"sum": list(children), "weights": list(weights)}:
            return Sum(*[_child(c, gates) for c in children], weights=[_weight(w, gates) for w in weights])
        case _:
            raise ValueError(f"{said!r} is no composition.")


def _child(said: Any, gates: dict[int, Learned]) -> Node:
    return _node_from_json(said, gates)


def _weight(said: Any, gates: dict[int, Learned]) -> Any:
    match said:
        case {"learned": int(number), "value": int() | float() as value}:
            start = value if 0 < value < math.inf else 1.0
            return gates.setdefault(number, Learned(start))
        case int() | float():
            return float(said)
        case _:
            raise ValueError(f"{said!r} is no gate of a composition.")
