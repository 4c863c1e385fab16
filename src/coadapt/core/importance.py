"""How much parameters matter, found while they train: what methods that give up ranks go by (arXiv:2303.10512)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .method import Progress


class Importance(Progress):
    """Running means of the sensitivities of some parameters, and of how far they deviate."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_buffer(f"mean_{name}", torch.zeros_like(parameter, requires_grad=False))
            self.register_buffer(f"deviation_{name}", torch.zeros_like(parameter, requires_grad=False))

    def note(self, parameters: Mapping[str, Tensor], beta1: float, beta2: float) -> None:
        """(8), (9), (10): the sensitivity is |w dL/dw|, at the weights that the gradients are of."""
        for name, parameter in parameters.items():
            mean, deviation = self.get_buffer(f"mean_{name}"), self.get_buffer(f"deviation_{name}")
            sensitivity = mean.new_zeros(()) if parameter.grad is None else (parameter * parameter.grad).abs()
            mean.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
            deviation.mul_(beta2).add_((sensitivity - mean).abs(), alpha=1 - beta2)

    def forget(self) -> None:
        """Begins anew."""
        for name, buffer in self.named_buffers(recurse=False):
            if name.startswith(("mean_", "deviation_")):
                buffer.zero_()

    def of(self, name: str) -> Tensor:
        """(11): how much each entry matters, in the shape of the parameter."""
        return self.get_buffer(f"mean_{name}") * self.get_buffer(f"deviation_{name}")


def best(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """For each vector of scores which of them are among the `count` largest of all; of equal ones the first."""
    every = torch.cat([s.to(scores[0].device) for s in scores])
    kept = torch.zeros_like(every, dtype=torch.bool)
    kept[every.sort(descending=True, stable=True).indices[:count]] = True
    return [part.to(s.device) for part, s in zip(kept.split([len(s) for s in scores]), scores, strict=True)]
