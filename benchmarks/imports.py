"""F13: what an import costs, each in an interpreter of its own."""

import json
import subprocess
import sys
from collections.abc import Mapping

from .report import COUNT, SECONDS, Row, absolute, ratio
from .setting import LIBRARIES, Setting

IMPORTS: Mapping[str, str] = {
    "base": "import torch, transformers",
    "bare": "import coadapt",
    **{library: f"from {library} import LoraConfig, get_peft_model" for library in LIBRARIES},
}

PROBE = """
import json, sys, time
before, begun = set(sys.modules), time.perf_counter()
{what}
took = time.perf_counter() - begun
others = {{m.partition(".")[0] for m in set(sys.modules) - before}} - set(sys.stdlib_module_names) - {{"coadapt"}}
print(json.dumps([took, sorted(others)]))
"""


def imported(what: str) -> tuple[float, list[str]]:
    """Seconds of an import, and the packages that it brought in, but for Python's and coadapt."""
    out = subprocess.run([sys.executable, "-c", PROBE.format(what=what)], capture_output=True, text=True, check=True)
    took, others = json.loads(out.stdout)
    return took, others


def imports(setting: Setting) -> list[Row]:
    """In turn, after one round that fills the file cache."""
    rounds = min(setting.rounds, 7)
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    others: list[str] = []
    for at in range(rounds + (not setting.quick)):
        for name, what in IMPORTS.items():
            took, brought = imported(what)
            if at or setting.quick:
                seconds[name].append(took)
            others = brought if name == "bare" else others
    heavy = f"packages that it loads{': ' if others else ''}{', '.join(others)}"
    return [
        absolute("F13", IMPORTS["bare"], {"coadapt": seconds["bare"]}, SECONDS, 0.1),
        absolute("F13", heavy, {"coadapt": [len(others)]}, COUNT, 0),
        ratio("F13", f"{IMPORTS['coadapt']} / {IMPORTS['base']}", seconds, 1.1, base="base"),
    ]
