"""Orthogonal wavelets: their filters, and one level of the inverse transform, along one dim and two."""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def synthesis(coefficients: Tensor, lowpass: Sequence[float], size: int) -> Tensor:
    """(N, P), smooth half and details -> (N, size): one level of the inverse wavelet transform, along the last dim."""
    length = len(lowpass)
    highpass = [(-1) ** k * lowpass[length - 1 - k] for k in range(length)]
    filters = torch.tensor([lowpass, highpass]).to(coefficients)[:, None]  # (2, 1, L)
    smooth = F.conv_transpose1d(coefficients.unflatten(-1, (2, -1)), filters, stride=2)  # (N, 1, P + L - 2)
    return smooth[:, 0, length - 2 : length - 2 + size]


def matrix_of(coefficients: Tensor, lowpass: Sequence[float], shape: Sequence[int]) -> Tensor:
    """(P, Q), along each dim smooth ones and then details -> `shape` (O, I): one level of the inverse transform."""
    across = synthesis(coefficients, lowpass, shape[1])
    return synthesis(across.mT, lowpass, shape[0]).mT


@functools.cache
def scaling_filter(name: str) -> tuple[float, ...]:
    """The lowpass filter of a wavelet: of Daubechies' by spectral factorisation (Ten Lectures, 1992, section 6.1).

    Raises:
        ValueError: there is none of this name, or PyWavelets is needed for it.
    """
    order = int(name[2:]) if name[:2] == "db" and name[2:].isdigit() else 0
    if 1 <= order <= 20:
        return _daubechies(order)
    try:
        pywt: Any = importlib.import_module("pywt")
    except ImportError as error:
        raise ValueError(
            f"wavelet_family={name!r} is not one of db1 to db20; others need PyWavelets (pip install PyWavelets)."
        ) from error
    if name not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"wavelet_family={name!r} is none of PyWavelets' orthogonal wavelets.")
    return tuple(pywt.Wavelet(name).rec_lo)


def _daubechies(order: int) -> tuple[float, ...]:
    """(1 + z)^N times the factors of those roots of P that lie inside of the unit circle, of length sqrt 2 N."""
    p = [math.comb(order - 1 + k, k) for k in range(order)]  # of y = (2 - z - 1/z) / 4
    found = np.array([1.0 + 0j])
    for y in np.roots(p[::-1]):
        half = 1 - 2 * y  # z^2 - 2 (1 - 2 y) z + 1 = 0
        z = half + np.sqrt(half * half - 1)
        found = np.convolve(found, [1.0, -(z if abs(z) < 1 else 1 / z)])
    for _ in range(order):
        found = np.convolve(found, [1.0, 1.0])
    real = np.real(found)
    return tuple(float(h) for h in real * (math.sqrt(2) / real.sum()))
