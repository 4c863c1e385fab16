"""The starts of LoRA's own paper, and of its code: A random and B zero, or both random."""

import math

import torch
from torch import nn

from . import Pair, Site, start


@start(True)
def default(at: Site) -> Pair:
    """A as PyTorch starts linear layers, each expert by itself, and B zero; at an embedding A zero and B normal."""
    a, b = _empty(at)
    nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))
    return _as_embedding(a, b) if at.layer.kind.name == "embedding" else (a, b)


@start("gaussian")
def gaussian(at: Site) -> Pair:
    """A normal with the spread 1 / r and B zero; at an embedding as by default."""
    a, b = _empty(at)
    nn.init.normal_(a, std=1 / at.rank)
    return _as_embedding(a, b) if at.layer.kind.name == "embedding" else (a, b)


@start("loftq")
def replaced(at: Site) -> Pair:
    """As by default, until LoftQ has worked its own out, with the weight that goes with it: see loftq.py."""
    return default(at)


@start(False)
def both(at: Site) -> Pair:
    """As by default, and what is zero there normal: for tests."""
    a, b = _empty(at)
    nn.init.kaiming_uniform_(a.flatten(0, -2), a=math.sqrt(5))
    if at.layer.kind.name == "embedding":
        return nn.init.normal_(a, std=0.02), nn.init.normal_(b)
    return a, nn.init.normal_(b, std=0.02)


def _empty(at: Site) -> Pair:
    *experts, out, inside = at.shape
    return torch.empty(*experts, at.rank, inside), torch.zeros(*experts, out, at.rank)


def _as_embedding(a: torch.Tensor, b: torch.Tensor) -> Pair:
    return nn.init.zeros_(a), nn.init.normal_(b)
