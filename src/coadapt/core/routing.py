"""Where the gates of a composition read: the sites of its adapters, and the stacks whose tokens are averaged."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .adapter import Adapter, Part
from .backbone import Backbone, stacks
from .composition import Node, names, routers, trained_gates
from .gates import Learned, Spot, TrainedGate, attention_site, input_site, span_site, stream_site
from .layer import LINEAR, Layer, kind_of
from .method import AttentionMethod, InputMethod
from .mixture import mixtures
from .roles import PROJECTIONS, attentions
from .routers import TaskRouter
from .stream import StreamMethod


def site_name(part: Part) -> str:
    """The name of a part's site for gates: two parts that read other things have other sites."""
    match part.method:
        case AttentionMethod():
            return attention_site(part.place.path)
        case InputMethod():
            return input_site(part.place.path)
        case StreamMethod():
            return stream_site(part.place.path)
        case _:
            return span_site(part.place.path) if part.place.reads else part.place.site


def prepare(node: Node, adapters: Mapping[str, Adapter], base: nn.Module) -> None:
    """Makes the parameters of a composition's gates that depend on the model. Does nothing the second time.

    Raises:
        ValueError: a gate cannot stand where it stands.
    """
    gates = trained_gates(node)
    if not gates:
        return
    streams = _Streams(base)
    owners = {id(router): found for router, found in routers(node)}
    if len(owners) < len(routers(node)):
        raise ValueError(f"{node!r} has one router in two places. Make one for each.")
    for gate in gates:
        if isinstance(gate, Learned):
            before = tuple(_before(gate, node))
            if gate.per_layer:
                gate.prepare(_spots(before, adapters, streams))
            beside = next((p for child in before for n in names(child) for p in adapters[n].parameters()), None)
            if beside is not None and not beside.is_meta:
                gate.to(beside.device)  # DistributedDataParallel wants all parameters on devices of one kind
        else:
            spots = _spots(owners[id(gate)].children, adapters, streams, refuse=repr(gate))
            if getattr(gate, "pools", False):
                streams.refuse_heads(spots, repr(gate))
            gate.prepare(spots)


def _before(gate: TrainedGate, node: Node) -> Iterator[Node]:
    """The children that a gate stands before."""
    for child, weight in zip(getattr(node, "children", ()), getattr(node, "weights", ()), strict=False):
        if weight is gate:
            yield child
    for child in getattr(node, "children", ()):
        yield from _before(gate, child)


def _spots(
    children: Sequence[Node], adapters: Mapping[str, Adapter], streams: "_Streams", refuse: str | None = None
) -> list[Spot]:
    found: dict[str, tuple[Part, dict[int, list[nn.Module]]]] = {}
    for i, child in enumerate(children):
        for name in names(child):
            for part in adapters[name].parts:
                if part.place.parameter and refuse:
                    raise ValueError(
                        f"{refuse} cannot weigh {name!r} at {part.place.path!r}: that is no layer but a parameter, "
                        "which has one value for the whole call."
                    )
                methods = found.setdefault(site_name(part), (part, {}))[1]
                methods.setdefault(i, []).append(part.method)
    return [_spot(site, part, methods, streams) for site, (part, methods) in found.items()]


def _spot(site: str, part: Part, methods: Mapping[int, Sequence[nn.Module]], streams: "_Streams") -> Spot:
    place, layer = part.place, Layer(part.place.module, part.place.path)
    kind = {AttentionMethod: "attention", InputMethod: "input"}
    stack = streams.of(place.path)
    read = Layer(place.reads[1]) if place.reads else layer
    shape = kind_of(place.module)
    embeds = shape is not None and shape.name == "embedding"
    width = stack.width if isinstance(part.method, InputMethod) and stack else read.input_width
    if embeds:
        width = layer.width
    outputs = layer.width
    if place.path in streams.mixtures:
        width = outputs = streams.mixtures[place.path]
    if place.parameter:
        outputs, width = place.layer.shape[-2:]
    if width is None or outputs is None:
        raise ValueError(f"Nothing tells how wide the input of {place.path!r} is, so no router can read it.")
    return Spot(
        site=site,
        path=place.site,
        width=width,
        outputs=outputs,
        children=tuple(methods),
        methods=methods,
        kind=next((name for cls, name in kind.items() if isinstance(part.method, cls)), "layer"),
        embeds=embeds,
        tokens=not (shape is not None and shape.channel == 1),
        stream="" if stack is None else stack.path,
        causal=stack is not None and stack.role == "decoder",
    )


class _Streams:
    """Which stack's tokens each module of a base sees."""

    def __init__(self, base: Any) -> None:
        self.stacks = stacks(base)
        self.mixtures = {m.path: m.width for m in mixtures(base)}
        """Mixtures of experts, whose width no layer of theirs tells."""
        found = attentions(base)
        self.attentions = {a.path: a.module for a in found}
        self.cross = {a.path for a in found if a.role == "cross"}

    def of(self, path: str) -> Backbone | None:
        """The stack that `path` lies in; the encoder for what reads its states; the last one for what is around."""
        if not self.stacks:
            return None
        parent, _, end = path.rpartition(".")
        if parent in self.cross and end in (*PROJECTIONS["key"], *PROJECTIONS["value"]):
            return self.stacks[0]
        inside = [s for s in self.stacks if path == s.path or path.startswith(f"{s.path}.") or not s.path]
        return max(inside, key=lambda s: len(s.path)) if inside else self.stacks[-1]

    def refuse_heads(self, spots: Sequence[Spot], who: str) -> None:
        """Raises ValueError for norms of queries and keys, which are given each head apart: (B, T, H, D)."""
        for spot in spots:
            around = self.attentions.get(spot.path.rpartition(".")[0])
            linears = [] if around is None else [Layer(m).width or 0 for m in around.children() if kind_of(m) == LINEAR]
            if spot.width < max(linears, default=0) and "norm" in spot.path.rpartition(".")[2]:
                raise ValueError(
                    f"{who} cannot pool the tokens at {spot.path!r}, which is given each head apart. Use a "
                    "TokenRouter, or leave that site out."
                )


def stream_of(base: Any, path: str) -> str:
    """The path of the stack whose tokens the module at `path` sees; "" where the model has none."""
    stack = _Streams(base).of(path)
    return "" if stack is None else stack.path


def has_routers(nodes: Sequence[Node]) -> bool:
    """Whether something in these compositions chooses gates by the call."""
    return any(routers(node) for node in nodes)


def fused(node: Node) -> bool:
    """Whether a composition has gates that read the outputs of what they stand before."""
    return any(hasattr(router, "fused") for router, _ in routers(node))


def keeps_sums(nodes: Sequence[Node]) -> bool:
    """Whether a router averages the tokens of a causal stack, which a cache must go on from."""
    return any(r.pools and any(s.causal for s in r.spots.values()) for node in nodes for r, _ in routers(node))


def tasks(nodes: Sequence[Node], adapters: Mapping[str, Adapter]) -> int:
    """How many tasks the routers and methods know that read `task_ids` (the fewest, but for those that know only one);
    0: none reads."""
    known = [r.num_tasks for node in nodes for r, _ in routers(node) if isinstance(r, TaskRouter)]
    known += [found for node in nodes for name in names(node) if (found := adapters[name].tasks)]
    return min([count for count in known if count > 1] or known, default=0)
