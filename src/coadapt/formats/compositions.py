"""A composition as JSON: a name, {"seq": [...]}, or {"sum": [...]} with "weights" or the "router" that chooses them."""

import math
from typing import Any

from ..core.composition import Node, Seq, Sum, trained_gates
from ..core.gates import Learned, TrainedGate
from ..core.router import Router
from ..core.routers import router_named


def node_to_json(node: Node) -> Any:
    """`node` as plain JSON values; a trained gate is told with its number in the file of gates.

    Raises:
        ValueError: a gate per row, which belongs to one batch.
    """
    return _node_to_json(node, trained_gates(node))


def _node_to_json(node: Node, gates: list[TrainedGate]) -> Any:
    if isinstance(node, str):
        return node
    children = [_node_to_json(c, gates) for c in node.children]
    if isinstance(node, Seq):
        return {"seq": children}
    if node.router is not None:
        return {
            "sum": children,
            "router": {"name": node.router.name, **node.router.said()},
            "gate": gates.index(node.router),
        }
    return {"sum": children, "weights": [_weight_to_json(w, gates) for w in node.weights]}


def _weight_to_json(weight: Any, gates: list[TrainedGate]) -> Any:
    if isinstance(weight, float):
        return weight
    if isinstance(weight, Learned):
        per_layer = {"per_layer": list(weight.layers) or True} if weight.per_layer else {}
        return {"learned": gates.index(weight), "value": weight.shares()[0], **per_layer}
    raise ValueError("A composition with a gate per row belongs to one batch and cannot be saved.")


def node_from_json(said: Any) -> Node:
    """Undoes `node_to_json`. Trained gates are new; what they have learned is in the file of gates.

    Raises:
        ValueError: it is no composition.
    """
    return _node_from_json(said, {})


def _node_from_json(said: Any, gates: dict[int, Learned]) -> Node:
    match said:
        case str():
            return said
        case {"seq": list(children)}:
            return Seq(*[_node_from_json(c, gates) for c in children])
        case {"sum": list(children), "router": {"name": str(name), **options}}:
            return Sum(*[_node_from_json(c, gates) for c in children], weights=_router(name, options))
        case {"sum": list(children), "weights": list(weights)}:
            return Sum(*[_node_from_json(c, gates) for c in children], weights=[_weight(w, gates) for w in weights])
        case _:
            raise ValueError(f"{said!r} is no composition.")


def _router(name: str, options: dict[Any, Any]) -> Router:
    return router_named(name, {str(k): v for k, v in options.items()})


def _learned(start: float, per_layer: Any) -> Learned:
    gate = Learned(start, per_layer=bool(per_layer))
    if isinstance(per_layer, list):
        gate.spread([str(layer) for layer in per_layer])
    return gate


def _weight(said: Any, gates: dict[int, Learned]) -> Any:
    match said:
        case {"learned": int(number), "value": int() | float() as value}:
            start = value if 0 < value < math.inf else 1.0
            return gates.setdefault(number, _learned(start, said.get("per_layer", False)))
        case int() | float():
            return float(said)
        case _:
            raise ValueError(f"{said!r} is no gate of a composition.")
