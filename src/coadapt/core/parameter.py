"""Parameters that belong to no layer as sites: fused experts, (E, O, I), and matrices that a module multiplies itself.

The module's own code runs on a stand-in for it, which has what the adapters make of its parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Part
from .around import Methods, around
from .composition import Node
from .experts import Experts
from .frame import Frame
from .gates import per_row
from .layer import StandIn
from .parameter_layer import ParameterLayer
from .site import first_input, plain_class
from .store import value


def methods_at(parts: Sequence[Part]) -> list[nn.Module]:
    """The methods that one adapter has at one parameter; those at its experts as one."""
    methods = [part.method for part in parts]
    return [Experts(methods)] if parts[0].place.expert is not None else list(methods)


def adapted(node: Node, module: nn.Module, path: str, name: str, methods: Methods) -> Tensor:
    """The parameter as `node` makes it, in its own layout and dtype."""
    layer = ParameterLayer(module, path, name)
    stored = layer.kind.canonical(around(node, layer, methods).weight())
    return stored.to(value(module, name).dtype).contiguous()


class ParameterCall:
    """What a plan has at a module of which parameters are adapted. `inner`: what else it has there."""

    def __init__(self, module: nn.Module, nodes: tuple[Node, ...], at: Mapping[tuple[str, str], Methods], inner: Any):
        self.module, self.nodes, self.inner = module, nodes, inner
        self.at = dict(at)
        """(path, name) of each parameter -> its methods."""

    def __call__(self, frame: Frame, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if frame.rows is None:
            return self._run(self.nodes[0], frame, forward, args, kwargs)
        x, _ = first_input(forward, args, kwargs)
        chosen = per_row(frame.rows, len(x)).to(x.device)
        out = self._run(None, frame, forward, args, kwargs)
        for c, node in enumerate(self.nodes):
            out = self._rows(chosen == c, self._run(node, frame, forward, args, kwargs), out)
        return out

    def _rows(self, here: Tensor, new: Any, old: Any) -> Any:
        """`new` in the rows that `here` marks, `old` in the others; routers return several tensors."""
        if isinstance(old, tuple):
            return tuple(self._rows(here, n, o) for n, o in zip(new, old, strict=True))
        if not isinstance(old, Tensor) or len(old) != len(here):
            raise TypeError(
                f"{type(self.module).__name__} returns something else than one result a row, so the rows of a batch "
                "cannot have adapted parameters of their own there. Give adapters= for the whole batch."
            )
        return torch.where(here.view(-1, *[1] * (old.dim() - 1)), new, old)

    def _run(
        self,
        node: Node | None,
        frame: Frame,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if node is not None:
            values: dict[str, Tensor] = {}
            for (path, name), methods in self.at.items():
                values[name] = adapted(node, self.module, path, name, methods)
            forward = partial(plain_class(type(self.module)).forward, StandIn(self.module, values))
        return forward(*args, **kwargs) if self.inner is None else self.inner(frame, forward, args, kwargs)
