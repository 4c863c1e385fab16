"""Memory: what a run needs for certain, before it begins, and what it has used."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from coadapt.training.units import size

LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Files that say what a container may use, and what it uses: of control groups, versions 2 and 1."""


def peak() -> int:
    """Bytes: the most that was in use so far, of the GPU, or of this process where no GPU is used."""
    if torch.cuda.is_available() and (used := torch.cuda.max_memory_allocated()):
        return used
    return resident()


def resident() -> int:
    """Bytes: the most that this process had in the machine's own memory so far."""
    process = psutil.Process().memory_info()
    if hasattr(process, "peak_wset"):
        return process.peak_wset
    import resource  # not on Windows

    kilobytes = 1 if psutil.MACOS else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes


def now() -> int:
    """Bytes in use at this moment, of the GPU, or of this process where no GPU is used."""
    if torch.cuda.is_available() and (used := torch.cuda.memory_allocated()):
        return used
    return psutil.Process().memory_info().rss


def total() -> int:
    """Bytes that the device has: the GPU, or this machine where no GPU is used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory of a device."""

    free: int
    total: int


def room(device: torch.device) -> Room:
    """What `device` has, and what of it is free at this moment; in a container no more than that may use."""
    if device.type in ("cuda", "xpu"):
        free, total = getattr(torch, device.type).mem_get_info(device)
        return Room(free=free, total=total)
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    for limit, used in LIMITS:
        if limit.is_file() and (most := limit.read_text().strip()).isdigit() and int(most) < total:
            free, total = min(free, int(most) - int(used.read_text())), int(most)
    return Room(free=max(free, 0), total=total)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes that stay for the whole run. Activations, which come and go with each batch, are not among them."""

    base: int
    """The frozen weights and buffers."""
    adapters: int
    gradients: int
    optimizer: int | None
    """The optimiser's states; None where its kind cannot be asked without running it."""

    @property
    def known(self) -> int:
        """The sum of what is known."""
        return self.base + self.adapters + self.gradients + (self.optimizer or 0)

    def __str__(self) -> str:
        states = "unknown" if self.optimizer is None else size(self.optimizer)
        parts = (
            f"base {size(self.base)} + adapters {size(self.adapters)} + gradients {size(self.gradients)} "
            f"+ optimiser states {states}"
        )
        more = "activations" if self.optimizer is not None else "optimiser states and activations"
        return f"{size(self.known)} without {more}: {parts}"


def forecast(base: nn.Module, adapters: Iterable[Tensor], optimizer: Optimizer) -> Forecast:
    """What `base`, `adapters` (all parameters of the view) and `optimizer` (before its first step) will hold."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return Forecast(
        base=_bytes([*base.parameters(), *base.buffers()]),
        adapters=_bytes(adapters),
        gradients=_bytes(trained),
        optimizer=_states(optimizer),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each tensor once, however many names it has."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _states(optimizer: Optimizer) -> int | None:
    """The states that one step makes, found with tensors that have a shape and no memory."""
    # A group holds all options of its optimiser already; which kernel runs the step changes no state.
    groups = [
        {
            **{name: value for name, value in group.items() if name not in ("fused", "foreach")},
            "params": [torch.empty_like(p, device="meta").requires_grad_() for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    try:
        twin = cast(Callable[..., Optimizer], type(optimizer))(groups)
        for parameter in (p for group in twin.param_groups for p in group["params"]):
            parameter.grad = torch.empty_like(parameter)
        twin.step()
    except Exception:  # whatever a kind of optimiser that wants real tensors, or a GPU, says to these
        return None
    states = (value for state in twin.state.values() for value in state.values())
    return _bytes(value for value in states if isinstance(value, Tensor))
