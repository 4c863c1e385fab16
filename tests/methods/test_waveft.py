"""WaveFT's own: filters and the transform, against tables, a slow way, and what makes wavelets orthogonal."""

import importlib.util

import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet

from coadapt import WaveFTConfig
from coadapt.core.wavelets import scaling_filter, synthesis
from laws.setting import close

OTHERS = pytest.mark.skipif(importlib.util.find_spec("pywt") is not None, reason="PyWavelets has them")


@pytest.mark.parametrize("order", range(1, 11))
def test_daubechies_filters_are_those_of_the_tables(order: int) -> None:
    found = torch.tensor(scaling_filter(f"db{order}"), dtype=torch.double)
    close(found, torch.tensor(Wavelet(f"db{order}").rec_lo, dtype=torch.double), 1e-11)


@pytest.mark.parametrize("order", range(1, 21))
def test_filters_are_orthonormal_to_their_shifts(order: int) -> None:
    h = torch.tensor(scaling_filter(f"db{order}"), dtype=torch.double)
    products = torch.stack([(h[2 * k :] * h[: len(h) - 2 * k]).sum() for k in range(order)])
    close(products, torch.tensor([1.0, *[0.0] * (order - 1)], dtype=torch.double), 1e-10)


@pytest.mark.parametrize("name", ["db1", "db4"])
def test_synthesis_is_the_sum_of_shifted_wavelets(name: str) -> None:
    h = scaling_filter(name)
    g = [(-1) ** k * h[len(h) - 1 - k] for k in range(len(h))]
    size, longer = 10, len(h) - 2
    coefficients = torch.randn(1, size + longer)
    half = coefficients.shape[1] // 2
    expected = torch.zeros(size + 3 * longer)
    for k in range(half):
        for n in range(len(h)):
            expected[2 * k + n] += coefficients[0, k] * h[n] + coefficients[0, half + k] * g[n]
    close(synthesis(coefficients, h, size)[0], expected[longer : longer + size])


@OTHERS
@pytest.mark.parametrize("name", ["sym4", "db21", "haar2"])
def test_others_say_what_they_need(name: str) -> None:
    with pytest.raises(ValueError, match=rf"wavelet_family='{name}' is not one of db1 to db20; .*PyWavelets"):
        WaveFTConfig(wavelet_family=name)
