"""Rows of unit length at right angles to each other: made, and drawn there while they train."""

import torch
from torch import Tensor


def orthonormal(rows: Tensor) -> Tensor:
    """(R, D) -> (R, D) with the same span: L^-1 R where L L^T = R R^T."""
    return torch.linalg.solve_triangular(torch.linalg.cholesky(rows @ rows.mT), rows, upper=False)


def pull(rows: Tensor) -> Tensor:
    """(R, D): half the gradient of the norm of R R^T - 1; none where that is zero."""
    excess = rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return excess @ rows / excess.norm().clamp(min=1e-12)
