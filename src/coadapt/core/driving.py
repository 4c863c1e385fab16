"""Methods that act between steps: told of every optimiser step that trains them, in whichever loop that is."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .adapter import Adapter
from .method import Driven, Progress

_followed: "weakref.WeakSet[Adapter]" = weakref.WeakSet()
_seen: "weakref.WeakKeyDictionary[Adapter, tuple[int, int, int]]" = weakref.WeakKeyDictionary()
"""At the last training call: writes into its parameters, steps that were told, and calls in a row with only the first
of them moving."""
_hooks: list[Any] = []


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
    for adapter in adapters:
        if adapter.steps is None or (parameter := _first(adapter)) is None:
            continue
        writes, told = parameter._version, int(adapter.steps)
        before = _seen.get(adapter, (writes, told, 0))
        unseen = before[2] + 1 if writes != before[0] and told == before[1] else 0
        _seen[adapter] = writes, told, unseen
        if unseen > 1:
            names = ", ".join(cls.__name__ for cls, _ in _groups(adapter))
            raise RuntimeError(
                f"Adapter {adapter.name!r} trains, but its method ({names}) is not told of the steps: whatever writes "
                "its parameters is no torch.optim.Optimizer. Train it with one, or use a method that needs no driving."
            )


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


def _first(adapter: Adapter) -> nn.Parameter | None:
    return next((p for p in adapter.parameters() if p.requires_grad), None)


def _groups(adapter: Adapter) -> list[tuple[type[Driven], Sequence[Any]]]:
    """The driven methods of an adapter, by class."""
    found: dict[type[Driven], list[Any]] = {}
    for part in adapter.parts:
        if isinstance(part.method, Driven):
            found.setdefault(type(part.method), []).append(part.method)
    return list(found.items())


def _trained_by(optimizer: Any) -> list[Adapter]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [a for a in list(_followed) if (first := _first(a)) is not None and id(first) in held and _has_grad(a)]


def _has_grad(adapter: Adapter) -> bool:
    return any(p.grad is not None for p in adapter.parameters())


@torch.no_grad()
def _before(optimizer: Any, args: Any, kwargs: Any) -> None:
    for adapter in _trained_by(optimizer):
        for cls, methods in _groups(adapter):
            cls.before_step(methods)


@torch.no_grad()
def _after(optimizer: Any, args: Any, kwargs: Any) -> None:
    for adapter in _trained_by(optimizer):
        assert adapter.steps is not None
        adapter.steps += 1
        for cls, methods in _groups(adapter):
            cls.after_step(methods, int(adapter.steps))
