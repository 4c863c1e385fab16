"""Methods that act between steps: told of every optimiser step that trains them, in whichever loop that is."""

import threading
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .adapter import Adapter
from .method import Driven, Progress

_followed: "weakref.WeakSet[Adapter]" = weakref.WeakSet()
_stepping: "weakref.WeakKeyDictionary[Any, list[Adapter]]" = weakref.WeakKeyDictionary()
"""Optimiser -> what it trains in the step that it is in."""
_untold: "weakref.WeakKeyDictionary[Adapter, list[Tensor]]" = weakref.WeakKeyDictionary()
"""Adapter that has been in a training call, and of no step of which this process was told yet -> the lengths of its
parameters then."""
_told: "weakref.WeakSet[Adapter]" = weakref.WeakSet()
"""Of whose steps this process has been told."""
_hooks: list[Any] = []


class _Hands(threading.local):
    """Of each thread: the adapters that it has called while it writes parameters by hand; None while it does not."""

    called: set[Adapter] | None = None


_hands = _Hands()


def follow(adapter: Adapter) -> None:
    """From now on the methods of `adapter` are told of the steps of any `torch.optim.Optimizer` that trains it."""
    if adapter.steps is None:
        return
    _followed.add(adapter)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))


def check(adapters: Iterable[Adapter]) -> None:
    """To be called when a training call begins.

    Raises:
        RuntimeError: something that is no `torch.optim.Optimizer` trains one of them, so that its method is not driven.
    """
    if _hands.called is not None:
        _hands.called.update(adapters)
        return
    for adapter in adapters:
        if adapter.steps is None or adapter in _told or not (parameters := _trained(adapter)):
            continue
        now = [p.detach().norm().cpu() for p in parameters]
        before = _untold.setdefault(adapter, now)
        if len(now) == len(before) and any(not torch.equal(a, b) for a, b in zip(now, before, strict=True)):
            names = ", ".join(cls.__name__ for cls, _ in _groups(adapter))
            raise RuntimeError(
                f"Adapter {adapter.name!r} trains, but its method ({names}) is not told of the steps: whatever writes "
                "its parameters is no torch.optim.Optimizer. Train it with one, or use a method that needs no driving."
            )
        _untold[adapter] = now


@contextmanager
def unwatched() -> Generator[None]:
    """Context: this thread writes parameters by hand. Its calls and its steps say nothing about how they train."""
    outer, _hands.called = _hands.called, set()
    try:
        yield
    finally:
        for adapter in _hands.called:
            forget(adapter)
        _hands.called = outer


def forget(adapter: Adapter) -> None:
    """To be called when its parameters were written otherwise than by a step."""
    _untold.pop(adapter, None)


def state(adapter: Adapter) -> dict[str, Tensor]:
    """What training needs to go on and inference does not, by the attribute paths of the adapter."""
    if adapter.steps is None:
        return {}
    found = {"steps": adapter.steps}
    for name, module in adapter.named_modules():
        if isinstance(module, Progress):
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return found


@torch.no_grad()
def restore(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Undoes `state`."""
    for name, value in state(adapter).items():
        value.copy_(tensors[name])


def settle(adapter: Adapter) -> None:
    """Freezes it, and gives up what only training needs."""
    adapter.requires_grad_(False)
    for module in list(adapter.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Progress):
                setattr(module, name, None)


def _trained(adapter: Adapter) -> list[nn.Parameter]:
    return [p for p in adapter.parameters() if p.requires_grad]


def _groups(adapter: Adapter) -> list[tuple[type[Driven], Sequence[Any]]]:
    """The driven methods of an adapter, by class; those of them that train."""
    found: dict[type[Driven], list[Any]] = {}
    for part in adapter.parts:
        if isinstance(part.method, Driven) and any(p.requires_grad for p in part.method.parameters()):
            found.setdefault(type(part.method), []).append(part.method)
    return list(found.items())


def _trained_by(optimizer: Any) -> list[Adapter]:
    """What an optimiser has gradients of. They are the same in all processes, and so is what is made of them."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [
        adapter for adapter in list(_followed) if any(p.grad is not None and id(p) in held for p in _trained(adapter))
    ]


def _refuse(adapter: Adapter, optimizer: Any) -> None:
    if any(hasattr(p, "full_tensor") for p in adapter.parameters()):
        raise RuntimeError(
            f"Adapter {adapter.name!r} has a method that acts between steps, which needs whole parameters; these are "
            "sharded. Leave the adapter unsharded (DistributedDataParallel), or use a method that needs no driving."
        )
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            f"Adapter {adapter.name!r} has a method that reads gradients, and a fused optimiser leaves them scaled "
            "under a GradScaler. Make the optimiser with fused=False."
        )


@torch.no_grad()
def _before(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not (found := _trained_by(optimizer)):
        return
    _stepping[optimizer] = found
    for adapter in found:
        _refuse(adapter, optimizer)
        assert adapter.steps is not None
        for cls, methods in _groups(adapter):
            cls.before_step(methods, int(adapter.steps) + 1)


@torch.no_grad()
def _after(optimizer: Any, args: Any, kwargs: Any) -> None:
    for adapter in _stepping.pop(optimizer, ()):
        assert adapter.steps is not None
        adapter.steps += 1
        if _hands.called is None:
            _told.add(adapter)
        for cls, methods in _groups(adapter):
            cls.after_step(methods, int(adapter.steps))
