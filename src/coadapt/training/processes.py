"""Several processes that train one run together (torchrun, accelerate launch): who writes, and what they agree on."""

import os

import torch
import torch.distributed as dist


def first() -> bool:
    """Whether this process writes and speaks for all: it is alone, or the first of them."""
    return int(os.environ.get("RANK", "0")) == 0


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_any(here: bool, device: torch.device) -> bool:
    """Whether something holds on any process. All of them have to ask at the same step."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return here
    found = torch.tensor(int(here), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)
