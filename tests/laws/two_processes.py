"""What two processes compute together, said once: for DistributedDataParallel, and for one process with all the rows.

Run as `python two_processes.py RANK FOLDER CASE ...` it is one of the two.
"""

import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cases import CASES as METHODS
from cases import VARIANTS
from coadapt import Learned, PeftModel, PooledRouter, Seq, Sum, TokenRouter
from coadapt.core.base import in_parts
from coadapt.training import devices
from coadapt.training.sharding import shard
from laws.setting import MAKE, attach, fits, ids, recompute

ROWS = 4
"""Two for each process."""
Forward = Sequence[Any]
"""What each of the four rows uses; ACTIVE: what is active."""
ACTIVE = ("active",)
Micro = Sequence[Forward]
"""The forwards that one backward goes through."""
Gradients = dict[str, Tensor | None]


def every(node: str) -> Forward:
    """All rows use the same, said with `adapters`."""
    return [node] * ROWS


@dataclass(frozen=True, kw_only=True)
class Case:
    """Steps of several micro-batches each, of which all but the last are made under `no_sync`."""

    steps: Sequence[Sequence[Micro]]
    cases: Sequence[str] = ("lora", "bottleneck", "prompt", "prefix")
    """Their adapters are a, b, c, d."""
    model: str = "llama"
    wrapped: dict[str, bool] = field(default_factory=lambda: {"find_unused_parameters": True})
    active: str | None = None
    reentrant: bool | None = None
    """Checkpointing: of which kind, or none."""
    precision: str = "fp32"
    sharded: bool = False
    """Whether each process holds a part of the base only."""

    def view(self) -> PeftModel:
        base = MAKE[self.model]()
        view = attach(base.bfloat16() if self.precision == "bf16" else base, self.model, *self.cases, by=0.3).train()
        if self.active == "gated":
            view.set_adapter(Sum("a", "b", Sum("b", "c"), weights=[Learned(0.7), Learned(1.3), Learned(0.4)]))
        elif self.active == "routed":
            torch.manual_seed(9)
            view.set_adapter(
                Seq(Sum("a", "d", weights=TokenRouter()), Sum("b", "a", weights=PooledRouter(activation="sigmoid")))
            )
        elif self.active is not None:
            view.set_adapter(self.active)
        if self.reentrant is not None:
            recompute(view, self.reentrant)
        return view

    def run(self, rank: int | None) -> list[Gradients]:
        """The gradients of each step; those of process `rank`, or of one that does it all."""
        view = self.view()
        rows = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        if rank is not None and self.sharded:
            shard(view, torch.device("cpu"))
            assert in_parts(view.base)
        model = view if rank is None else DistributedDataParallel(view, **self.wrapped)
        optimizer = torch.optim.SGD([p for p in view.parameters() if p.requires_grad], lr=0.1)
        found: list[Gradients] = []
        for step in self.steps:
            for i, micro in enumerate(step):
                alone = isinstance(model, DistributedDataParallel) and i + 1 < len(step)
                with model.no_sync() if alone else nullcontext():  # type: ignore[operator]
                    (self._loss(model, micro, seed=i, rows=rows) / len(step)).backward()
            found.append({n: p.grad for n, p in view.named_parameters() if p.requires_grad})
            found[-1] = {n: None if g is None else g.clone() for n, g in found[-1].items()}
            optimizer.step()  # what got no gradient must not move
            optimizer.zero_grad()
        return found

    def _loss(self, model: Any, micro: Micro, seed: int, rows: slice) -> Tensor:
        """A mean over rows, so that the mean over processes is that of the whole batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "autocast"):
            out = sum(self._scores(model, forward, seed, rows) for forward in micro)
        assert isinstance(out, Tensor)
        return (out * torch.linspace(-1, 1, out.shape[-1])).square().mean()

    def _scores(self, model: Any, forward: Forward, seed: int, rows: slice) -> Tensor:
        tokens = ids(ROWS, seed=seed)[rows]
        options: dict[str, Any] = {"decoder_input_ids": tokens[:, :4]} if self.model in ("t5", "bart") else {}
        if len(forward) == ROWS:
            options |= {"adapters": forward[0]} if len(set(forward)) == 1 else {"adapter_names": list(forward)[rows]}
        return model(input_ids=tokens, **options).logits.float()


MIXED = ["a", "a + b", None, "0.5*c >> b"]
ONE_SIDE = ["a", "b", None, None]
"""The second process uses nothing."""
PLAIN: dict[str, bool] = {}
FIXED = {"static_graph": True}
CHANGING = [[[MIXED]], [[ONE_SIDE]], [[every("c")]], [[[None, "a", "b", "c"]]]]
SERIAL = [[[every("a"), every("b")]], [[every("b"), every("a"), every("c")]], [[every("d"), MIXED]]]
ACCUMULATED = [[[ONE_SIDE], [["c", None, "b", "b"]], [every("b")]], [[every("c")], [every("b")]]]
SAME = [[[every("a + 0.5*b >> c")]]] * 2
ROUTED = ("lora", "bottleneck", "prompt", "lora-all-linear")
SAME_SERIAL = [[[every("a"), every("b"), every("a")]]] * 2

QUICK: dict[str, Case] = {
    "parallel": Case(steps=SAME),
    "parallel-all-plain": Case(steps=[[[ACTIVE]]] * 2, wrapped=PLAIN),
    "rows": Case(steps=CHANGING),
    "serial": Case(steps=SERIAL),
    "driven": Case(steps=[[[ACTIVE]], *[[[ACTIVE], [ACTIVE]]] * 3], cases=("adalora",), wrapped=PLAIN, active="a"),
    "accumulated": Case(steps=ACCUMULATED),
    "gates": Case(steps=[[[ACTIVE]], [[ACTIVE, MIXED]], [[MIXED]]], active="gated"),
    "routers": Case(steps=[[[ACTIVE]], [[ACTIVE, MIXED]], [[MIXED]]], active="routed", cases=ROUTED, reentrant=False),
    "rows-checkpointed": Case(steps=CHANGING, reentrant=False),
    "serial-checkpointed": Case(steps=SERIAL, reentrant=False),
    "serial-reentrant-fixed": Case(steps=SAME_SERIAL, reentrant=True, wrapped=FIXED),
    "gates-reentrant-fixed": Case(steps=[[[ACTIVE]]] * 2, active="gated", reentrant=True, wrapped=FIXED),
    "rows-bf16": Case(steps=[[[MIXED]], [[ONE_SIDE]]], precision="bf16"),
    "serial-autocast": Case(steps=SERIAL[:1], precision="autocast"),
    "sharded": Case(steps=[[[ACTIVE]], [[every("a + 0.5*b >> c")]], [[MIXED]]], sharded=True),
}
_STEPS = {"rows": CHANGING, "serial": SERIAL, "accumulated": ACCUMULATED}
_OTHERS = {
    "gpt2": ("lora-bias", "prefix-decoupled", "p-tuning", "ia3"),
    "bloom": ("lora-all-linear", "bottleneck-parallel", "prompt", "ln-tuning"),
    "t5": ("dora", "bottleneck-pfeiffer", "prompt", "prefix-projected"),
    "bart": ("full-copy", "bitfit", "prompt", "prefix"),
    "mixtral": ("lora-experts", "bottleneck", "lora-tokens", "tokens"),
}
FULL: dict[str, Case] = {
    f"{model}-{name}-{kind}": Case(steps=steps, cases=cases, model=model, reentrant=reentrant)
    for model, cases in _OTHERS.items()
    for name, steps in _STEPS.items()
    for kind, reentrant in (("plain", None), ("checkpointed", False))
}
SHARDED: dict[str, Case] = {
    f"sharded-{model}-{case}": Case(
        steps=[[[ACTIVE]], [[ACTIVE], [ACTIVE]]],
        cases=(case,),
        model=model,
        active="a",
        sharded=True,
        reentrant=reentrant,
    )
    for model, reentrant in (("llama", None), ("gpt2", False))
    for case in (*METHODS, *VARIANTS)
    if fits(case, model) and not case.startswith((*devices.WHOLE_WEIGHTS, "pvera"))  # pvera draws numbers
}
"""Every method on a base in parts."""
CASES = {**QUICK, **FULL, **SHARDED}


def main(rank: int, folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = CASES[name].run(rank)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the other process is out of step
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
