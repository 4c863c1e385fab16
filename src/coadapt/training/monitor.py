"""How each adapter moves, and what its gates are: norms, ranks, gates, spikes; a word about one that stands still.

docs/monitors.md has every figure with its name, formula and source.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from coadapt.core import composition
from coadapt.core.adapter import Adapter
from coadapt.core.composition import Node, Sum
from coadapt.core.gates import Learned, Routed
from coadapt.core.method import Method
from coadapt.model import PeftModel
from coadapt.training.log import Figures, append, figures_in
from coadapt.training.ranks import FEW, SITES, rank_of
from coadapt.training.spikes import WINDOW, begins

LOGGED_STEPS = 3
"""So many logged steps in a row without moving, and an adapter is said to stand still."""
TOO_SMALL = 1e-4
"""An update of less than this share of another adapter's, both relative to their parameters. Rates that are published
for methods lie within a factor of 1000."""


class Tell(Protocol):
    """Says a warning; `event` are facts for the log beside it."""

    def __call__(self, step: int, message: str, **event: Any) -> None: ...


def _nobody(step: int, message: str, **event: Any) -> None: ...


class Monitor:
    """Clips each optimiser group by itself and measures it, at the steps that will be logged.

    To be called right before and right after the optimiser's own step, with the gradients that the step uses:
    accumulated, and no longer scaled.
    """

    def __init__(self, view: PeftModel) -> None:
        self.view = view
        self.tell: Tell = _nobody
        self.figures: Figures = {}
        """Group -> `learning_rate`, and where it was measured: `grad_norm` (before clipping), `update_norm` (of the
        difference that the step made), `update_ratio` (that, relative to the parameters after the step), the same of
        each kind of parameter (`grad_norm.A`), and `effective_rank` (see ranks.py)."""
        self._gradients: dict[str, dict[str, Tensor]] = {}
        self._copies: dict[str, list[Tensor]] = {}

    def before_step(self, groups: Sequence[Mapping[str, Any]], step: int, measure: bool) -> None:
        """Clips; if `measure`, keeps the gradients' norms and a copy of the parameters.

        Raises:
            ValueError: a gradient is not finite. Nothing was changed yet.
        """
        groups = _by_adapter(groups)
        self.figures = {group["name"]: {"learning_rate": float(group["lr"])} for group in groups}
        norms = {group["name"]: _gradient(group["params"]) for group in groups}
        if broken := [name for name, norm in norms.items() if not math.isfinite(norm)]:
            self._refuse(broken, list(norms), step)
        for group in groups:
            name, longest, params = group["name"], group["max_grad_norm"], group["params"]
            if measure:
                parts = self._parts(name, params)
                self._gradients[name] = {kind: _gradient(some) for kind, some in parts.items()}
                self._copies[name] = [p.detach().clone() for p in params]
            if longest:
                clip_grads_with_norm_(params, longest, norms[name])

    def _refuse(self, broken: Sequence[str], names: Sequence[str], step: int) -> None:
        for name in broken:
            wrong = [n for n, p in self._module(name).named_parameters() if _is_broken(p.grad)]
            of = f"{wrong[0]} and {len(wrong) - 1} others" if len(wrong) > 1 else "".join(wrong)
            self.tell(step, f"The gradient of {name!r} is not finite: {of}.", event="gradient_not_finite", adapter=name)
        finite = ", ".join(repr(name) for name in names if name not in broken)
        rest = f"That of {finite} is." if finite else "It is so for all that trains: the loss is likely no number."
        raise ValueError(
            f"The gradient of {', '.join(map(repr, broken))} is not finite at step {step}, whose update was not made. "
            f"{rest} Use a lower learning_rate or more warmup_steps, or bf16 in place of fp16."
        )

    def _module(self, name: str) -> nn.Module:
        return self.view.gates if name == "gates" else self.view.get_adapter(name)

    def _parts(self, name: str, params: Sequence[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
        """The parameters of each kind, where there is more than one, and all of them under ""."""
        module = self._module(name)
        named = kinds(module) if isinstance(module, Adapter) else {}
        parts: dict[str, list[nn.Parameter]] = {}
        for p in params:
            parts.setdefault(named.get(p, ""), []).append(p)
        return {**(parts if len(parts) > 1 else {}), "": list(params)}

    @torch.no_grad()
    def after_step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """The figures of a step that was measured; the copy is given up."""
        for group in _by_adapter(groups):
            name, params = group["name"], group["params"]
            if (before := self._copies.pop(name, None)) is None:
                continue
            update = {p: p - old for p, old in zip(params, before, strict=True)}
            gradients = self._gradients.pop(name)
            for kind, some in self._parts(name, params).items():
                moved, now = float(get_total_norm([update[p] for p in some])), float(get_total_norm(some))
                found = {"grad_norm": float(gradients[kind]), "update_norm": moved}
                found["update_ratio"] = moved / (now or moved or 1.0)  # from x to 0 is a step of 1
                self.figures[name] |= {f"{figure}.{kind}".rstrip("."): value for figure, value in found.items()}
            module = self._module(name)
            rank = rank_of(module, max(FEW, SITES // len(groups))) if isinstance(module, Adapter) else None
            self.figures[name] |= {} if rank is None else {"effective_rank": rank}

    def logs(self) -> dict[str, float]:
        """The figures under the names that they are logged by: `grad_norm/task`, `grad_norm.A/task`."""
        return {f"{figure}/{name}": value for name, of in self.figures.items() for figure, value in of.items()}

    def levels(self, step: int, loss: float, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What a line of the log has beside: the gates, and how many spikes of the loss there were; tells of a new one.

        Args:
            history: the lines before, as in Trainer's state, so that a resumed run counts on.
        """
        lines = [line for line in history if "loss" in line]
        losses = [*(line["loss"] for line in lines[-WINDOW - 1 :]), loss]
        count = lines[-1].get("loss_spikes", 0) if lines else 0
        if not math.isfinite(loss):
            self.tell(step, f"The loss is {loss} at step {step}.", event="loss_not_finite")
        elif found := begins(losses):
            count += 1
            self.tell(
                step,
                f"The loss jumped to {loss:.4g} at step {step}, from a level of {found.level:.4g}.",
                event="loss_spike",
                loss=loss,
                level=found.level,
                bound=found.bound,
            )
        return {"loss_spikes": count, **{f"gate/{name}": value for name, value in gate_values(self.view).items()}}


def _by_adapter(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One group for each name: what LoRA+ splits is one adapter here, with the rate of its first part."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        one = found.setdefault(group["name"], {**group, "params": []})
        one["params"] = [*one["params"], *group["params"]]
    return list(found.values())


def _gradient(params: Sequence[nn.Parameter]) -> Tensor:
    return get_total_norm([p.grad for p in params if p.grad is not None])


def _is_broken(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(gradient.isfinite().all())


def kinds(adapter: Adapter) -> dict[nn.Parameter, str]:
    """Parameter -> what it is in its method: "A" and "B"; "down", "up" and "norm" of a bottleneck; else its name."""
    found = {p: _kind(part.method, name) for part in adapter.parts for name, p in part.method.named_parameters()}
    shared = () if adapter.shared is None else adapter.shared.named_parameters()
    return found | {p: name.partition(".")[0] for name, p in shared}


def _kind(method: nn.Module, name: str) -> str:
    first, _, rest = name.partition(".")
    child = method.get_submodule(first) if rest else None
    if isinstance(child, Method):  # DoRA's LoRA
        return _kind(child, rest)
    return "norm" if isinstance(child, nn.LayerNorm) else first


# ---- gates -----------------------------------------------------------------------------------------------------------


def gate_values(view: PeftModel) -> dict[str, float]:
    """What each trained gate stands before, as text -> the gate now; of routers the mean since this was last asked.

    A gate before several children has an entry for each; two gates before the same one are told apart by a number.
    """
    standing: dict[tuple[int, Any], list[str]] = {}
    for gate, child, label in _gates(view.composition):
        standing.setdefault((id(gate), child), []).append(label)
    found: dict[str, float] = {}
    for gate in composition.trained_gates(view.composition):
        for child, value in gate.shares().items():
            for label in standing.get((id(gate), child), [str(child)]):
                again = sum(name.split(" #")[0] == label for name in found)
                found[f"{label} #{again + 1}" if again else label] = value
    return found


def _gates(node: Node) -> Iterator[tuple[Any, Any, str]]:
    """(module of a gate, its child by the number that `shares` has, what it stands before)"""
    if isinstance(node, str):
        return
    for child in node.children:
        yield from _gates(child)
    for child, weight in zip(node.children, node.weights, strict=True) if isinstance(node, Sum) else ():
        if isinstance(weight, Learned):
            yield weight, 0, label(child)
        elif isinstance(weight, Routed):
            yield weight.router, weight.child, label(child)


def label(node: Node) -> str:
    """A composition without its gates, which change: a name for it that stays."""
    if isinstance(node, str):
        return node
    inner = [child if isinstance(child, str) else f"({label(child)})" for child in node.children]
    return (" + " if isinstance(node, Sum) else " >> ").join(inner)


# ---- what is said of them --------------------------------------------------------------------------------------------


class Stillness(TrainerCallback):
    """Tells once of each adapter that does not move, or moves by a share of another's that cannot be right.

    Args:
        tell: gets the step and the message.
    """

    def __init__(self, view: PeftModel, tell: Callable[[int, str], None]) -> None:
        self.view = view
        self.tell = tell
        self.still: dict[str, int] = {}
        """Adapter -> logged steps in a row without moving."""
        self._told: set[str] = set()

    def stands_still(self, name: str) -> bool:
        """Whether the adapter has not moved for several logged steps."""
        return self.still.get(name, 0) >= LOGGED_STEPS

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.still.clear()
        # A resumed run begins as the unbroken one would stand here: what was told is in its log.
        for line in state.log_history:
            self._told |= set(self._count(figures_in(line)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        figures = figures_in(logs)
        for name in self._count(figures):
            if name not in self._told:
                self._told.add(name)
                self.tell(state.global_step, self._message(name, figures))

    def _count(self, figures: Figures) -> list[str]:
        """Who stands still by now."""
        measured = {name: of for name, of in figures.items() if "update_norm" in of}
        for name in measured:
            self.still[name] = self.still.get(name, 0) + 1 if _unmoved(name, measured) else 0
        return [name for name in measured if self.stands_still(name)]

    def _message(self, name: str, figures: Figures) -> str:
        of = figures[name]
        what = "its gradient is 0" if not of["grad_norm"] else f"its updates have norm {of['update_norm']:.1e}"
        return (
            f"{name!r} stands still: {what} for {LOGGED_STEPS} logged steps. "
            f"Likely reason: {self._reason(name, figures)}."
        )

    def _reason(self, name: str, figures: Figures) -> str:
        of, rate = figures[name], figures[name]["learning_rate"]
        module: nn.Module = self.view.gates if name == "gates" else self.view.get_adapter(name)
        if not any(p.requires_grad for p in module.parameters()):
            return "it is frozen"
        if name != "gates" and name not in self.view.active_adapters:
            return f"it is not in the composition {self.view.composition!r}"
        if not of["grad_norm"]:
            return f"its gate in {self.view.composition!r} is 0, or no row of the data uses it"
        if not rate:
            return "its learning rate is 0"
        if not of["update_norm"]:
            return f"its learning rate {rate:.1e} is too small to change its parameters"
        other = max(figures, key=lambda n: figures[n].get("update_ratio", 0.0))
        times = figures[other]["update_ratio"] / of["update_ratio"]
        theirs = figures[other]["learning_rate"]
        return f"its learning rate {rate:.1e}; {other!r} at {theirs:.1e} moves {times:,.0f} times as far"


def _unmoved(name: str, figures: Figures) -> bool:
    of = figures[name]
    largest = max(f["update_ratio"] for f in figures.values())
    return not of["grad_norm"] or not of["update_norm"] or of["update_ratio"] < TOO_SMALL * largest


def teller(console: Console, file: Path) -> Tell:
    """Says a warning on `console`, and as a line of the log in `file`."""

    def tell(step: int, message: str, **event: Any) -> None:
        console.print(Text(f"warning: {message}", "yellow"), soft_wrap=not console.is_terminal)
        append(file, {"step": step, **event, "warning": message})

    return tell
