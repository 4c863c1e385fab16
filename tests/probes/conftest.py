"""Every probe runs over these models, unless it names its own."""

from collections.abc import Callable
from typing import Any

import pytest

import models


@pytest.fixture(params=["llama", "gpt2", "t5", "bert"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a base; two calls give equal ones."""
    return models.MODELS[request.param]
