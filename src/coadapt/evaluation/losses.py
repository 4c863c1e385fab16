"""Cross entropies of rows: what training adds up, and what evaluation tells of each row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from coadapt.data.tokens import IGNORED


def trained(labels: Tensor, task: str) -> Tensor:
    """(B,) trained tokens of each row, the first never among those of a language model; 1 where a row has a class."""
    if labels.dim() < 2:
        return torch.ones(len(labels), device=labels.device)
    return (labels[:, 1:] if task == "causal-lm" else labels).ne(IGNORED).sum(1).float()


def row_losses(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """(B,) the sum of the cross entropies of each row's trained tokens, in float32.

    Args:
        logits: (B, T, V), or (B, classes).
        labels: (B, T), or (B,); those of a language model are shifted here.
    """
    if labels.dim() < 2:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1)
