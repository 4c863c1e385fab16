"""One thread for each worker: the models are too small for more."""

import pytest
import torch


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
