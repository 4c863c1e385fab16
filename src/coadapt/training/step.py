"""One training step, and what it holds: with data or without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from coadapt.training.live import Meter

BATCHES = 2
"""Of those that a step is made of, so many are run: the third holds what the second does."""
Phase = Literal["forward", "backward", "optimiser step"]


@dataclass(frozen=True)
class Bytes:
    """Of one training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What is alive between forward and backward, beyond the weights."""
    peak: int
    """The most that is alive at once, all counted."""
    phase: Phase
    """Where that is."""


def one_step(
    meter: Meter,
    loss: Callable[[], Tensor],
    optimizer: Optimizer,
    *,
    weights: int,
    batches: int = 1,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    monitored: bool = False,
) -> Bytes:
    """What a step holds whose optimiser has its states already.

    Args:
        batches: that the step is made of.
        monitored: as a step that is logged, which keeps the parameters to see how far they move.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    meter.restart()
    before, activations, peaks = meter.now, 0, dict[int, Phase]()  # where each height was first reached
    for _ in range(min(batches, BATCHES)):
        found = loss()
        activations = activations or meter.now - before - found.nbytes
        peaks.setdefault(meter.peak, "forward")
        backward(found)
        del found
        peaks.setdefault(meter.peak, "backward")
    gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
    with torch.no_grad():
        kept = [p.detach().clone() for p in trained] if monitored else []
        optimizer.step()
        moved = [new - old for old, new in zip(kept, trained, strict=False)]
        del kept, moved
    optimizer.zero_grad()
    phase = peaks.setdefault(meter.peak, "optimiser step")
    return Bytes(weights, gradients, states(optimizer), activations, meter.peak, phase)


def states(optimizer: Optimizer) -> int:
    """Bytes of what an optimiser keeps from step to step."""
    return sum(t.nbytes for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor))


def settle(optimizer: Optimizer) -> None:
    """The optimiser gets the states that it has from its first step on."""
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
