"""The frozen base in parts, one on each process (`fully_shard`, FSDP2); adapters whole on all, and averaged as ever.

A base has neither gradients nor an optimiser, so its weights are all that there is to share out. Adapters are small:
whole, they are what they are without it to clipping, schedules, monitors and checkpoints, and `DistributedDataParallel`
around the view averages their gradients.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from coadapt.core.roles import blocks
from coadapt.core.store import quantised
from coadapt.model import PeftModel


def refuse_quantised(base: nn.Module) -> None:
    """Raises ValueError where a base has quantised layers, which were never tried in parts."""
    if (found := next(quantised(base), None)) is not None:
        raise ValueError(
            f"fsdp: the base is quantised ({found[0]} is a {type(found[1]).__name__}), and a quantised base in parts "
            "was never tried. Leave fsdp out, or take the base that is not quantised."
        )


def shard(view: PeftModel, device: torch.device) -> None:
    """Leaves of the base's weights only this process's share here: block by block, and the rest as one.

    A block is made whole for its forward, and again for its backward. What the view adds is moved to `device`.
    """
    base: nn.Module = view.get_base_model()
    view.adapters.to(device)
    view.gates.to(device)
    own = {*view.adapters.parameters(), *view.gates.parameters()}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    view.get_extra_state()  # takes the base's fingerprint, while its weights are whole
    for block in blocks(base):
        fully_shard(base.get_submodule(block.path), mesh=mesh, ignored_params=own)
    fully_shard(view, mesh=mesh, ignored_params=own)  # the rest, which prompts read outside of the base's forward
    names = [name for name, p in view.named_parameters() if p not in own]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(view, names)
