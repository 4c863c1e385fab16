"""A view inside of `DistributedDataParallel`: which of its settings a call needs, and what the wrapper has to see."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

RECIPE = (
    "Wrap it as DistributedDataParallel(model, find_unused_parameters=True); of transformers' Trainer that is "
    "ddp_find_unused_parameters=True, which is its default for a PeftModel."
)


def _wrapper() -> DistributedDataParallel | None:
    """The wrapper whose forward is running, where gradients are to be averaged."""
    wrapper = DistributedDataParallel._active_ddp_module  # pyright: ignore[reportPrivateUsage]
    return wrapper if torch.is_grad_enabled() and not torch.compiler.is_compiling() else None


_AVERAGED: "weakref.WeakKeyDictionary[DistributedDataParallel, list[Tensor]]" = weakref.WeakKeyDictionary()


def _averaged(wrapper: DistributedDataParallel) -> list[Tensor]:
    """The parameters that trained when the wrapper was made: it knows no others."""
    if wrapper not in _AVERAGED:
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
        _AVERAGED[wrapper] = [p for bucket in buckets for p in bucket.parameters()]
    return _AVERAGED[wrapper]


def check(members: Mapping[str, nn.Module], names: Iterable[str], gates: Iterable[nn.Module]) -> None:
    """Refuses a call whose gradients would hang, or differ between the processes.

    Args:
        members: what a view owns, by name: its adapters, and "gates".
        names: the adapters that take part in this call.
        gates: the trained gates that do.

    Raises:
        RuntimeError: the wrapper does not know a parameter that will get a gradient, or waits for one that will not.
    """
    wrapper = _wrapper()
    if wrapper is None:
        return
    used = {name: trained(members[name]) for name in names}
    used["gates"] = [p for gate in gates for p in trained(gate)]
    known = {id(p) for p in _averaged(wrapper)}
    if late := sorted(name for name, own in used.items() if not all(id(p) in known for p in own)):
        raise RuntimeError(
            f"{', '.join(late)}: attached, unfrozen or made active after the model was wrapped in "
            "DistributedDataParallel, which does not average these gradients over the processes. Wrap it again."
        )
    here = {id(p) for own in used.values() for p in own}
    idle = [name for name, module in members.items() if any(id(p) not in here for p in trained(module))]
    if idle and not wrapper.find_unused_parameters and not wrapper.static_graph:
        raise RuntimeError(
            f"{', '.join(idle)} would train, but takes no part in this call, and DistributedDataParallel waits for "
            f"the gradient of every parameter. {RECIPE} Or freeze what is not to be trained."
        )


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def joined(output: Any) -> Any:
    """A call's output, from which the wrapper reaches everything that trains; values and gradients stay as they are.

    The wrapper takes what the last output does not depend on for unused. So a loss over two forwards would fail (what
    only the first one used gets its gradient after all), and so would a process whose rows use nothing (no gradient at
    all). Joined, every parameter reports once in each backward, most of them that they got nothing; and what got
    nothing on any process, in no forward since the last step, keeps the gradient None.
    """
    wrapper = _wrapper()
    if wrapper is None or not wrapper.find_unused_parameters or wrapper.static_graph:
        return output
    own = [p for p in _averaged(wrapper) if p.requires_grad]
    return tree_map_only(Tensor, lambda t: _Join.apply(t, *own) if t.is_floating_point() else t, output)


class _Join(torch.autograd.Function):
    """(output, *parameters) -> output; the parameters get no gradient, which is not a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(parameters)
        # No view, which fully_shard's hooks advise against. The wrapper copies outputs itself, so that they may be
        # changed in place.
        return output.data

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], *[None] * ctx.count


def refuse_reentrant() -> None:
    """Reentrant checkpointing hides from the wrapper what the parts that it recomputes use.

    Raises:
        RuntimeError: the wrapper looks for unused parameters, and would find those.
    """
    wrapper = _wrapper()
    if wrapper is not None and wrapper.find_unused_parameters and not wrapper.static_graph:
        raise RuntimeError(
            "Reentrant gradient checkpointing does not work under DistributedDataParallel(find_unused_parameters="
            "True). Checkpoint with use_reentrant=False; or, where every step uses the same adapters, wrap the model "
            "with static_graph=True instead."
        )
