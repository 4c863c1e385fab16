"""Where the time above the limit goes: PyTorch's profiler on what stays above its goal, beside its limit.

    python -m benchmarks.profiles --publish    # two quiet cores, two minutes; the tables go to docs/benchmarks.md

Each table sorts what coadapt does more than its limit by what does it, in microseconds of one call, from the profiler's
self times. `outside` is what no operation accounts for: Python between them, and what the profiler itself costs.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .__main__ import DOCS
from .mixed_rows import with_loras
from .overhead import HandWritten, chain, chain_with_lora
from .report import machine, markdown
from .setting import LORA, Setting, adapted, llama, tokens
from .training_step import lora_steps

MARKED = re.compile(r"(<!-- profiled: made by python -m benchmarks.profiles -->\n).*(<!-- /profiled -->)", re.DOTALL)
PRODUCTS = re.compile(r"aten::(add|badd|)?(mm|bmm)_?$")
MOVES = re.compile(r"aten::(copy_|cat|clone|fill_|zero_|_to_copy|empty.*|new_empty.*|stack|index_select)$")


@dataclass(frozen=True)
class Spent:
    """One call: microseconds and how often, by what was done."""

    us: Mapping[str, float]
    times: Mapping[str, float]


def kind(operation: str) -> str:
    if not operation.startswith("aten::"):
        return "autograd, and Python inside of it"
    if PRODUCTS.match(operation):
        return "products of matrices"
    return "copies, and new memory" if MOVES.match(operation) else "other operations"


def spent(call: Callable[[], Any], calls: int) -> Spent:
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        whole = (time.perf_counter() - begun) * 1e6
    us, times = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in profiler.key_averages():
        us[kind(event.key)] += event.self_cpu_time_total
        times[kind(event.key)] += event.count
    us["outside"], us["whole"] = whole - sum(us.values()), whole
    return Spent({k: v / calls for k, v in us.items()}, {k: v / calls for k, v in times.items()})


def table(calls: Mapping[str, Callable[[], Any]], setting: Setting) -> str:
    """`calls`: the limit's and coadapt's. The least of some rounds, which take turns."""
    found: dict[str, Spent] = {}
    for _ in range(setting.size(5, 2)):
        for name, call in calls.items():
            one = spent(call, setting.size(10, 1))
            if name not in found or one.us["whole"] < found[name].us["whole"]:
                found[name] = one
    least, ours = found.values()
    whole = least.us["whole"]
    lines = [
        [
            what,
            *(
                f"{one.us.get(what, 0):.0f} us" + (f" ({one.times[what]:.0f})" if what in one.times else "")
                for one in found.values()
            ),
            f"{(ours.us.get(what, 0) - least.us.get(what, 0)) / whole:+.1%}",
        ]
        for what in dict.fromkeys([*ours.us, *least.us])
    ]
    return markdown(["", *(f"{name} (operations)" for name in calls), "more, of the whole"], lines)


def rows(setting: Setting, length: int) -> Mapping[str, Callable[[], Any]]:
    """Rows that each name an adapter, without gradients."""
    count = setting.size(16, 3)
    view = with_loras("coadapt", setting, count).eval()
    view.requires_grad_(False)
    base, ids = llama(setting).eval(), tokens(setting, count, length)
    return {
        "base": torch.no_grad()(lambda: base(ids)),
        "coadapt": torch.no_grad()(lambda: view(ids, adapter_names=[f"a{i}" for i in range(count)])),
    }


def merging(setting: Setting) -> Mapping[str, Callable[[], Any]]:
    """Into the weights and out again, which moves nothing; beside a copy of as many bytes."""
    base: Any = llama(setting)
    weights = [p for n, p in base.named_parameters() if n.endswith("_proj.weight")]
    source = torch.randn(sum(w.numel() for w in weights), device=setting.device)
    target = torch.empty_like(source)
    view = adapted("coadapt", base, "LoraConfig", **LORA)

    def call() -> None:
        view.merge_adapter()
        view.unmerge_adapter()

    return {"copy": lambda: target.copy_(source), "coadapt": call}


def profiled(setting: Setting) -> dict[str, Mapping[str, Callable[[], Any]]]:
    """What stays above its goal -> the limit's call, and coadapt's."""

    def training(dtype: torch.dtype, dropout: float = 0.0) -> Mapping[str, Callable[[], Any]]:
        steps = lora_steps(setting, dtype, dropout)
        return {"limit": steps["limit"], "coadapt": steps["coadapt"]}

    small = torch.randn(8, 64, device=setting.device)
    hand, view = chain(setting, lambda linear: HandWritten(linear, 8)), chain_with_lora("coadapt", setting)
    return {
        "F1, a training step in fp32": training(torch.float32),
        "F2, in bf16": training(torch.bfloat16),
        "F2, in bf16 with dropout 0.05": training(torch.bfloat16, 0.05),
        "F4, 16 rows of 1 token, 16 adapters": rows(setting, 1),
        "F4, 16 rows of 32 tokens, 16 adapters": rows(setting, setting.size(32, 2)),
        "F10, forward and backward of 200 layers of 64 x 64": {
            "hand-written": lambda: hand(small).sum().backward(),
            "coadapt": lambda: view(small).sum().backward(),
        },
        "F15, merging": merging(setting),
    }


def publish(text: str) -> None:
    whole, found = MARKED.subn(lambda marks: f"{marks[1]}{text}{marks[2]}", DOCS.read_text("utf-8"))
    assert found == 1, f"{DOCS} has lost its marks"
    DOCS.write_text(whole, "utf-8")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Such figures mean nothing")
    parser.add_argument("--publish", action="store_true", help="put the tables into docs/benchmarks.md")
    given = parser.parse_args(arguments)
    if given.publish and given.quick:
        parser.error("--publish is for a whole run, without --quick.")
    torch.set_num_threads(given.threads)
    setting = Setting(quick=given.quick)
    head = f"{date.today()}, `{' '.join(['python -m benchmarks.profiles', *arguments])}`, torch {torch.__version__}, "
    parts = [f"{head}on {machine()}.\n"]
    for what, calls in profiled(setting).items():
        parts.append(f"{what}:\n\n{table(calls, setting)}\n")
    text = "\n".join(parts)
    print(text)
    if given.publish:
        publish(text)


if __name__ == "__main__":
    main(sys.argv[1:])
