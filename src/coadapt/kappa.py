"""Which layers to adapt, by the condition of their weights: KappaTune (arXiv:2506.16289)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .core.layer import Layer, kind_of
from .core.store import value

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""Ends of the names of parameters that hold the weights of all experts of a layer."""


@torch.no_grad()
def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
) -> dict[str, list[str] | None]:
    """The linear layers, and the parameters of experts, whose largest singular value is least above the smallest.

    Such weights are the least specialised, and training changes what the model knows least there.
    `LoraConfig(**find_kappa_target_modules(model))` adapts them.

    Args:
        top_p: the share of all that is taken, in (0, 1].
        max_dim_size_to_analyze: weights with a side longer than this are passed over: each needs all of its singular
            values.
        moe_param_suffixes: ends of the names of the experts' parameters (E, O, I); left out, those that are usual.

    Returns:
        target_modules, best first; and target_parameters, None where there are none.

    Raises:
        ValueError: `top_p` is out of range.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"find_kappa_target_modules: top_p={top_p!r} must lie in (0, 1].")
    ends = tuple(moe_param_suffixes or EXPERTS)
    layers: dict[str, float] = {}
    experts: dict[str, float] = {}
    for path, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None and kind.name == "linear":
            _note(layers, path, Layer(module, path).weight(), max_dim_size_to_analyze)
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}"
            if parameter.dim() == 3 and whole.endswith(ends):
                _note(experts, whole.removeprefix("."), value(module, name), max_dim_size_to_analyze)
    return {"target_modules": _best(layers, top_p), "target_parameters": _best(experts, top_p) or None}


def _note(found: dict[str, float], path: str, weight: Tensor, most: int) -> None:
    """weight: (..., O, I); of experts the mean is noted."""
    if max(weight.shape[-2:]) <= most:
        values = torch.linalg.svdvals(weight.float())
        found[path] = float((values[..., 0] / (values[..., -1] + 1e-8)).mean())


def _best(found: Mapping[str, float], share: float) -> list[str]:
    return sorted(found, key=lambda path: found[path])[: max(1, int(len(found) * share))]
