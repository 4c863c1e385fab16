"""Writes the table of docs/quantised.md: each quantiser that is installed here is held to each law, over all methods.

    PYTHONPATH=src:tests python tests/quant/page.py [NAME ...]

Rows of other quantisers stay as they are: run it again in the environment that has them.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from laws.setting import attach
from quant import test_laws as laws
from quant.quantisers import QUANTISERS, make

PAGE = Path(__file__).parents[2] / "docs" / "quantised.md"
BEGIN, END = "<!-- table: tests/quant/page.py -->", "<!-- end of the table -->"

EACH_METHOD: dict[str, Callable[..., None]] = {
    "outputs, gradients": laws.test_as_on_the_dequantised_base,
    "merged as floats, taken out": partial(laws.test_merging_and_exact_unmerging, into="dequantised"),
    "merged and quantised anew, taken out": partial(laws.test_merging_and_exact_unmerging, into="quantised"),
    "rows": laws.test_a_row_of_a_mixed_batch_is_that_row_alone,
    "saved, loaded": laws.test_saved_and_loaded,
}
ONCE: dict[str, Callable[..., None]] = {
    "copies": laws.test_copies,
    "no floats kept": laws.test_no_weight_is_kept_as_floats,
    "removed": laws.test_the_base_is_as_it_was_when_the_last_view_goes,
    "merged for good": laws.test_merged_for_good,
}
HEAD = ["quantiser", "library", "`within`", *EACH_METHOD, *ONCE]


def holds(law: Callable[..., None], name: str, *case: str) -> bool:
    """Whether a law holds; what it says where it does not is printed."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"tmp_path": Path(folder)} if law is laws.test_saved_and_loaded else {}
        try:
            law(name, *case, **options)
        except Exception as error:
            print(f"{name} {case}: {type(error).__name__}: {error}"[:300])
            return False
    return True


def row(name: str) -> list[str]:
    """The cells of one quantiser."""
    quantiser = QUANTISERS[name]
    cells = [name, f"{quantiser.library} {version(quantiser.library)}", f"{quantiser.within:g}"]
    views = {case: attach(make(name), "llama", case) for case in laws.CASES}
    merged = [case for case, view in views.items() if laws.mergeable(view) and laws.on_quantised(view)]
    for law in EACH_METHOD.values():
        cases = merged if isinstance(law, partial) else laws.CASES
        cells.append(f"{sum(holds(law, name, case) for case in cases)} of {len(cases)}")
    return [*cells, *("yes" if holds(law, name) else "**no**" for law in ONCE.values())]


def main() -> None:
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    old, after = rest.split(END)
    known = {line.split("|")[1].strip(): line for line in old.strip().splitlines()[2:]}
    for name, quantiser in QUANTISERS.items():
        if find_spec(quantiser.library) is not None and (len(sys.argv) == 1 or name in sys.argv):
            make(name)
            known[name] = f"| {' | '.join(row(name))} |"
            print(known[name], flush=True)
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *(known[n] for n in QUANTISERS if n in known)]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", "utf-8")


if __name__ == "__main__":
    assert pytest  # the laws are tests
    warnings.simplefilter("error", UserWarning)
    main()
