"""One thread for each worker: the models are too small for more. And how the quick run spreads methods over laws."""

import zlib
from typing import Any

import pytest
import torch

from cases import CASES

THOROUGH = ("lora", "bottleneck", "dora", "ia3", "prefix", "prompt", "lora-all-linear", "lora-experts")
"""Cases that each law tries in all the ways that it has for the quick run."""

SLOW = ("test_an_adapter_holds_nothing_but_its_own",)
"""Laws that look at every object there is: seconds each, and the code is the core's."""
FORMS = ("tests/laws/test_merge_law.py", "tests/laws/test_saving.py", "tests/laws/test_saved.py")


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Every other method is tried once by each law, in one of those ways, which differ from case to case; further forms
    of a method by the merge law and those about files only."""
    ways: dict[tuple[str, str], list[Any]] = {}
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, str) and case not in THOROUGH and item.get_closest_marker("full") is None:
            if item.originalname in SLOW or (case not in CASES and not item.nodeid.startswith(FORMS)):
                item.add_marker(pytest.mark.full)
                continue
            ways.setdefault((item.nodeid.partition("[")[0], case), []).append(item)
    for key, found in ways.items():
        kept = zlib.crc32("".join(key).encode()) % len(found)
        for number, item in enumerate(found):
            if number != kept and item.callspec.params.get("kind") != "linear":
                item.add_marker(pytest.mark.full)
