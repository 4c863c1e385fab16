"""What a call hands down to the sites below it, and takes along into recomputation."""

import functools
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .distributed import refuse_reentrant


class SiteCall(Protocol):
    """What stands around one module's forward in one plan."""

    def __call__(
        self, frame: "Frame", forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any: ...


class Frame:
    """One call of a view: what stands at each site, and which composition each row of the batch uses."""

    def __init__(
        self,
        calls: Mapping[nn.Module, SiteCall],
        attention: Mapping[nn.Module, Any],
        rows: Sequence[int] | None,
        tasks: Tensor | None = None,
    ) -> None:
        self.calls, self.attention = calls, attention
        self.rows = None if rows is None else torch.tensor(rows)
        """(B,) indices into the plan's compositions, or None where there is one for all."""
        self._rows = None if rows is None or torch.compiler.is_compiling() else tuple(rows)
        self.tasks = tasks
        """(B,) the task of each row, for routers by task."""
        self.first: Tensor | None = None
        """(B, T, D) the last hidden states of the bare model, for routers that read those."""
        self.whole = False
        """Whether the states of virtual tokens are returned, whatever their methods say: for a loss that reads them."""
        self.kept: Any = None
        """(B, T) where the last stack has put the real tokens, if there are virtual ones."""
        self.mixture = torch.empty(0)
        """(B, S) how much of each slot each row uses, in a compiled call: see slots.py."""
        self.seen: dict[str, Any] = {}
        """What pooling needs to know of each stack's tokens, by its path: see pooling.py."""
        self.sums: dict[tuple[int, str], Any] = {}
        """Running sums of pooled features, while a cache grows."""
        self.invoked: dict[tuple[int, ...], Any] = {}
        """Invocation -> which tokens come from it on: see invocation.py."""
        self.asked: int | None = None
        """How many tokens of each row were given, where more are generated in this call."""
        self.inputs: dict[str, Any] = {}
        """Inputs of modules that a site further on reads, by path; each is taken out when it is read."""
        self.gates: dict[Any, Tensor] = {}
        """Gates that are the same numbers at many sites, as tensors."""
        self.states: dict[Any, Tensor] = {}
        """(B, T, D) states that go along the blocks, as they are now, by what they come from: see stream.py."""
        self.began: dict[Any, Tensor] = {}
        """The same as they began."""
        self.stacked: dict[Any, tuple[Tensor, Tensor]] = {}
        """Factors of each row's adapters, the same for all tokens of a call of `generate`: see rows.py."""
        self.given: dict[Any, Any] = {}
        """Products that one layer made for another which reads the same input: see lowrank.py."""

    def rows_of(self, x: Tensor) -> tuple[int, ...] | None:
        """The composition of each row of x, (B, ...), by its number; None where x has others than the call's rows."""
        if self._rows is None or len(x) % len(self._rows):
            return None
        beams = len(x) // len(self._rows)
        return self._rows if beams == 1 else tuple(c for c in self._rows for _ in range(beams))


class _Active(threading.local):
    def __init__(self) -> None:  # on each thread: torch.compile guards on the attributes that are there
        self.frame: Frame | None = None
        self.carried = False


_active = _Active()


def current() -> Frame | None:
    """The frame of the call that is running on this thread."""
    return _active.frame


class entered:
    """Context: `frame` is the current one. Nests; an exception leaves nothing behind."""

    def __init__(self, frame: Frame | None, carried: bool = False, plan: Any = None) -> None:
        self.frame, self.carried, self.plan = frame, carried, plan

    def __enter__(self) -> Any:
        self.before = (_active.frame, _active.carried)
        _active.frame, _active.carried = self.frame, self.carried
        return self.plan

    def __exit__(self, *_: object) -> None:
        _active.frame, _active.carried = self.before


def go_on_with(frame: Frame | None) -> None:
    """Makes `frame` the current one for the rest of the call that is running."""
    _active.frame = frame


class Bare:
    """A base whose methods run without adapters inside of a view's call too: an assistant that shares its weights."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._base, name)
        return self._outside(found) if isinstance(found, types.MethodType) else found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._outside(self._base)(*args, **kwargs)

    def _outside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with entered(None):
                return function(*args, **kwargs)

        return call


def in_backward() -> bool:
    """Whether this is a recomputation of what a forward has done already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]


def refuse_lost_frame() -> None:
    """Called at a site that has no frame. Raises RuntimeError inside of a recomputation that did not take it along."""
    if not _active.carried and in_backward():
        raise RuntimeError(
            "A part of the model is recomputed in the backward without knowing which adapters were active. "
            "Where you call torch.utils.checkpoint.checkpoint yourself, call coadapt.checkpoint instead."
        )


class Carried:
    """A checkpointing function that takes the frame of the forward along into the recomputation, on any thread."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = current()
        riding = {} if frame is None else frame.states
        if frame is not None and riding:
            function, args = _Riding(function, frame, tuple(riding)), (*args, *riding.values())

        def again(*inputs: Any, **named: Any) -> Any:
            with entered(frame, carried=True):
                return function(*inputs, **named)

        told = {**getattr(self.checkpoint, "keywords", {}), **kwargs}
        if frame is not None and told.get("use_reentrant") and torch.is_grad_enabled():
            refuse_reentrant()
            args = _with_gradient(args)
        out = self.checkpoint(again, *args, **kwargs)
        return function.taken(out) if isinstance(function, _Riding) else out


class _Riding:
    """What is checkpointed, with the states that go along in it as inputs and outputs."""

    def __init__(self, function: Callable[..., Any], frame: Frame, keys: tuple[Any, ...]) -> None:
        self.function, self.frame, self.keys = function, frame, keys
        self.single = False
        """Whether what it gives is no tuple."""

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
        count, before = len(self.keys), self.frame.states
        self.frame.states = dict(zip(self.keys, inputs[-count:], strict=True))
        try:
            out = self.function(*inputs[:-count], **named)
            self.single = not isinstance(out, tuple)
            return (*((out,) if self.single else out), *(self.frame.states[key] for key in self.keys))
        finally:
            self.frame.states = before

    def taken(self, out: tuple[Any, ...]) -> Any:
        """What was asked for; the states go on in the frame."""
        count = len(self.keys)
        self.frame.states = dict(zip(self.keys, out[-count:], strict=True))
        return out[0] if self.single else out[:-count]


def _with_gradient(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Reentrant checkpointing gives what is inside gradients only if an input has one; frozen features have none."""
    if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return inputs
    first = next((i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()), len(inputs))
    return (*inputs[:first], *(x.detach().requires_grad_() for x in inputs[first : first + 1]), *inputs[first + 1 :])


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint`, for modules that call it themselves under a PeftModel."""
    return Carried(torch.utils.checkpoint.checkpoint)(function, *args, use_reentrant=use_reentrant, **kwargs)
