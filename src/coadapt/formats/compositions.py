"""A composition as JSON, and as the folder that holds one."""

from typing import Any

from ..core.composition import Learned, Node, Seq, Sum


def node_to_json(node: Node) -> Any:
    """A name, or {"seq": [...]}, or {"sum": [...], "weights": [...]}; learned gates are {"learned": value}."""
    match node:
        case str():
            return node
        case Seq():
            return {"seq": [node_to_json(c) for c in node.children]}
        case _:
            weights = [_weight(w) for w in node.weights]
            return {"sum": [node_to_json(c) for c in node.children], "weights": weights}


def _weight(weight: Any) -> Any:
    match weight:
        case float():
            return weight
        case Learned():
            return {"learned": float(weight().detach())}
        case _:
            raise ValueError("A composition with a gate per row belongs to one batch and cannot be saved.")


def node_from_json(said: Any) -> Node:
    """Undoes `node_to_json`. Raises ValueError for anything else."""
    match said:
        case str():
            return said
        case {"seq": list(children)}:
            return Seq(*[_child(c) for c in children])
        case {"sum": list(children), "weights": list(weights)}:
            gates = [Learned(w["learned"]) if isinstance(w, dict) else float(w) for w in weights]
            return Sum(*[_child(c) for c in children], weights=gates)
        case _:
            raise ValueError(f"{said!r} is no composition.")


def _child(said: Any) -> Node:
    return node_from_json(said)
