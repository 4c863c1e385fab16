"""One thread for each worker: the models are too small for more. And how methods are spread over laws and models."""

import os
import zlib
from typing import Any

import pytest
import torch

from cases import CASES

THOROUGH = ("lora", "bottleneck", "dora", "ia3", "prefix", "prompt", "lora-all-linear", "lora-experts")
"""Cases that each law tries in all the ways that it has: some of them in the quick run, all of them in the full one."""
MODELS_EACH = 4
"""On how many models the full run tries every other case in each law; another choice of them for each law."""

SLOW = ("test_an_adapter_holds_nothing_but_its_own",)
"""Laws that look at every object there is: seconds each, and the code is the core's."""
FORMS = ("tests/laws/test_merge_law.py", "tests/laws/test_saving.py", "tests/laws/test_saved.py")


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Of every other method: one way of each law in the quick run; one way on each of a few models in the full run. Its
    further forms are for the full run, but where files and merging are concerned. With WHOLE=1: all that there is."""
    spread: dict[tuple[str, str], list[Any]] = {}
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(case, str) and case not in THOROUGH:
            spread.setdefault((item.nodeid.partition("[")[0], case), []).append(item)
    beyond: set[Any] = set()
    for (law, case), found in spread.items():
        slow = law.endswith(SLOW) or (case not in CASES and not law.startswith(FORMS))
        quick = [item for item in found if not slow and item.get_closest_marker("full") is None]
        drawn = min(quick, key=_drawn, default=None)
        kept = [i for i in quick if i is drawn or i.callspec.params.get("kind") == "linear"]
        for item in found:
            if item not in kept and item.get_closest_marker("full") is None:
                item.add_marker(pytest.mark.full)
        many = 1 if law.endswith(SLOW) else MODELS_EACH
        beyond.update(_beyond(found, {i.callspec.params.get("model") for i in kept}, many) - set(kept))
    if beyond and not os.environ.get("WHOLE"):
        config.hook.pytest_deselected(items=list(beyond))
        items[:] = [item for item in items if item not in beyond]


def _drawn(item: Any) -> int:
    """A number that looks random, and is the same everywhere."""
    return zlib.crc32(item.nodeid.encode())


def _beyond(found: list[Any], models: set[Any], many: int) -> set[Any]:
    """All but one way on each of so many models, `models` among them; everything counts where a law has no models."""
    ways: dict[Any, Any] = {}
    for item in sorted(found, key=_drawn):
        if "model" in item.callspec.params:
            ways.setdefault(item.callspec.params["model"], item)
    chosen = sorted(ways, key=lambda model: (model not in models, _drawn(ways[model])))[:many]
    return set(found) - {ways[model] for model in chosen} if ways else set()
