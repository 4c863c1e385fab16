import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side."""
    torch.set_num_threads(1)
