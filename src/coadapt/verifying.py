"""One tiny step that proves, adapter by adapter, that training does what it is meant to; nothing is left changed."""

import tempfile
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .core import composition, driving
from .core.adapter import Adapter, ModuleCopy, Part
from .core.method import AttentionMethod, InputMethod, WeightMethod
from .core.store import packed_store
from .core.view import View

OUTPUT, GRADIENT, STEP, FROZEN, BASE, MERGED, SAVED = (
    "changes the output",
    "gets a gradient",
    "is changed by a step",
    "nothing frozen changes",
    "disabled, it is the base",
    "merged, it is the same",
    "saved and loaded, it is the same",
)
"""What is proved: the first three for each adapter, the others once."""


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    what: str
    adapter: str
    """The adapter's name; empty for what concerns all of them."""
    passed: bool
    detail: str = ""
    """What failed: tensors, by name, or a figure."""
    reason: str = ""
    """Why, most likely, and what to do."""
    grave: bool = True
    """Whether training would be in vain; otherwise this batch may just not reach everything."""

    def __str__(self) -> str:
        line = f"{'ok  ' if self.passed else 'FAIL'}  {self.adapter or 'all':<16} {self.what}"
        told = [] if self.passed else [text for text in (self.detail, self.reason) if text]
        return "\n      ".join([line, *told])


@dataclass(frozen=True)
class Proof:
    """What `verify` found; true where nothing failed."""

    findings: Sequence[Finding]
    skipped: Mapping[str, str]
    """What could not be tried -> why."""

    @property
    def failed(self) -> list[Finding]:
        return [f for f in self.findings if not f.passed]

    def __bool__(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        lines = [str(finding) for finding in self.findings]
        return "\n".join(
            [*lines, *(f"-     {'all':<16} {what}: not tried, {why}" for what, why in self.skipped.items())]
        )


def verify(view: Any, batch: Any, loss: Callable[[Any], Tensor] | None = None, merge: bool = True) -> Proof:
    """Tries a step on `batch` and puts everything back: parameters, gradients, random numbers, the training mode.

    Args:
        view: a PeftModel; its active composition is tried.
        batch: what the model is called with: keyword arguments, or its first argument. With labels for a real loss.
        loss: (output) -> scalar; left out, the output's own `loss`, or a fixed combination of the output's values.
        merge: try merging as well, which needs room for the merged weights.
    """
    call = _caller(view, batch)
    with _restored(view), driving.unwatched(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        findings = [_is_base_when_disabled(view, call)]
        names = [n for n in composition.names(view.composition) if _trains(view.get_adapter(n))]
        _move(view, names)  # away from starts at which a gradient is rightly zero (B = 0 in a LoRA)
        findings += _each_changes_the_output(view, names, call)
        unused = {f.adapter: f.reason for f in findings if not f.passed}
        findings += _step(view, names, call, loss, unused)
        skipped: dict[str, str] = {}
        expected = _output(call, view)
        for what, why, tried in (
            (MERGED, _unmergeable(view) if merge else "merge=False", _merged),
            (SAVED, "a gate per row belongs to one batch" if composition.row_gates(view.composition) else "", _saved),
        ):
            try:
                if not why:
                    findings.append(tried(view, call, expected))
            except OSError as error:
                why = f"there is no room for it: {error}"
            if why:
                skipped[what] = why
    findings += [
        Finding(GRADIENT, name, False, "it takes no part", f"It is not in the composition {view.composition!r}.")
        for name in view.peft_config
        if name not in composition.names(view.composition) and _trains(view.get_adapter(name))
    ]
    return Proof(findings, skipped)


# ---- what is tried --------------------------------------------------------------------------------------------------


def _is_base_when_disabled(view: Any, call: Callable[[Any], Any]) -> Finding:
    with view.disable_adapter():
        off = _output(call, view)
    same = torch.equal(off.nan_to_num(), _output(call, view.get_base_model()).nan_to_num())
    return Finding(BASE, "", same, "" if same else "another output than the base's own")


def _each_changes_the_output(view: Any, names: Sequence[str], call: Any) -> list[Finding]:
    found: list[Finding] = []
    whole = _output(call, view)
    for name in names:
        with view.using(composition.muted(view.composition, name)):
            changed = not torch.equal(_output(call, view), whole)
        reason = "" if changed else _why_unused(view.get_adapter(name), view, call)
        found.append(Finding(OUTPUT, name, changed, "the same with and without it", reason))
    return found


def _step(
    view: Any, names: Sequence[str], call: Any, loss: Callable[[Any], Tensor] | None, unused: Mapping[str, str]
) -> list[Finding]:
    trained = {n: dict(view.get_adapter(n).named_parameters()) for n in names}
    frozen = [p for p in view.parameters() if not p.requires_grad]
    versions = [p._version for p in frozen]
    view.train()
    view.zero_grad(set_to_none=True)
    value = _loss(call(view), loss)
    if not bool(torch.isfinite(value)):
        reason = "Labels may all be masked (-100), or the base is in float16 and overflows; use bfloat16."
        return [Finding(GRADIENT, name, False, f"the loss is {float(value.detach())}", reason) for name in names]
    if value.requires_grad:
        value.backward()
    found: list[Finding] = []
    for name, parameters in trained.items():
        lost = [n for n, p in parameters.items() if p.requires_grad and (p.grad is None or not bool(p.grad.any()))]
        bad = [n for n, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        reason = "The gradients are not finite; use bfloat16, or a smaller loss scale." if bad else ""
        if lost:
            reason = unused.get(name) or _why_no_gradient(view, view.get_adapter(name), lost, call, value)
        whole = bool(bad) or len(lost) == len(parameters)
        found.append(Finding(GRADIENT, name, not lost and not bad, _listed(lost or bad), reason, grave=whole))
    starts = {id(p): p.detach().clone() for ps in trained.values() for p in ps.values()}
    torch.optim.AdamW([p for p in view.parameters() if p.requires_grad], lr=1e-3, weight_decay=0).step()
    for name, parameters in trained.items():
        still = [n for n, p in parameters.items() if p.requires_grad and torch.equal(p, starts[id(p)])]
        found.append(Finding(STEP, name, not still, _listed(still), grave=False))
    moved = sum(v != p._version or p.grad is not None for v, p in zip(versions, frozen, strict=True))
    found.append(Finding(FROZEN, "", not moved, f"{moved} frozen parameters were written, or got a gradient"))
    view.zero_grad(set_to_none=True)
    return found


def _unmergeable(view: Any) -> str:
    if composition.routers(view.composition) or composition.row_gates(view.composition):
        return f"the gates of {view.composition!r} depend on what goes in"
    parts = [(n, p) for n in composition.names(view.composition) for p in view.get_adapter(n).parts]
    kept = [p for _, p in parts if not isinstance(p.method, AttentionMethod | InputMethod)]
    other = [f"{n!r} is a {type(p.method).__name__}" for n, p in parts if p in kept and not _is_map(p)]
    if other:
        return f"{other[0]}, which is no change of weights"
    if kept and any(packed_store(p.place.module) is not None for p in kept):
        return "the base is quantised: its weights as floats may not fit, and merging tells by itself what it loses"
    return "" if kept else "nothing in it is a change of weights"


def _is_map(part: Part) -> bool:
    return isinstance(part.method, WeightMethod | ModuleCopy)


def _merged(view: Any, call: Any, expected: Tensor) -> Finding:
    try:
        view.merge_adapter()
    except (TypeError, ValueError) as error:
        return Finding(MERGED, "", False, str(error))
    try:
        return _close(MERGED, _output(call, view), expected, 1e-3 if expected.dtype == torch.float32 else 0.1)
    finally:
        view.unmerge_adapter()


def _saved(view: Any, call: Any, expected: Tensor) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        view.save_pretrained(Path(folder), selected_adapters=composition.names(view.composition) or None)
        again = type(view).__mro__[1].from_pretrained(view.get_base_model(), folder).eval()
        try:
            return _close(SAVED, _output(call, again), expected, 1e-5)
        finally:
            again.unload()


def _close(what: str, found: Tensor, expected: Tensor, within: float) -> Finding:
    off = float((found.float() - expected.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6))
    return Finding(what, "", off <= within, f"off by {off:.1e} of the largest value (at most {within:.0e} is rounding)")


# ---- likely reasons -------------------------------------------------------------------------------------------------


def _called(view: Any, modules: set[nn.Module], call: Any) -> set[nn.Module]:
    seen: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: seen.add(m)) for m in modules]
    try:
        _output(call, view)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _why_unused(adapter: Adapter, view: Any, call: Any) -> str:
    modules = {p.place.module for p in adapter.parts}
    if missed := modules - _called(view, modules, call):
        path = next(p.place.path for p in adapter.parts if p.place.module in missed)
        return (
            f"{len(missed)} of its {len(modules)} modules are not called, {path!r} among them: a fused kernel or a "
            "function that reads the weight itself bypasses them. Switch that off, or target other modules."
        )
    return f"Its gate may be 0 in {view.composition!r}."


def _why_no_gradient(view: Any, adapter: Adapter, lost: Sequence[str], call: Any, value: Tensor) -> str:
    if not value.requires_grad:
        return (
            "The loss depends on nothing that trains: something runs under no_grad, or detaches what it gives; or "
            "reentrant checkpointing gets inputs that need no gradient (use_reentrant=False)."
        )
    if float(value.detach()) == 0:
        return "The loss is 0: every label may be masked (-100)."
    sites = {p.place.module: p.place.path for p in adapter.parts if any(n.startswith(p.key + ".") for n in lost)}
    missed = set(sites) - _called(view, set(sites), call)
    if missed:
        path = next(sites[m] for m in sites if m in missed)
        return f"{path!r} was not called: something reads its weight without calling it."
    return "This batch does not reach it: tokens that are not in it, experts without a token, a ReLU that is off."


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} tensors: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}" if names else ""


# ---- how it is tried ------------------------------------------------------------------------------------------------


def _trains(adapter: Adapter) -> bool:
    return any(p.requires_grad for p in adapter.parameters())


def _caller(view: Any, batch: Any) -> Callable[[Any], Any]:
    if isinstance(batch, Mapping):
        given = {k: v.to(_device(view)) if isinstance(v, Tensor) else v for k, v in batch.items()}
        plain = {k: v for k, v in given.items() if k != "task_ids"}  # the base has no routers that ask for them
        return lambda model: model(**(given if isinstance(model, View) else plain))
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"verify needs a batch: a dict of the model's inputs, or a tensor; got a {type(batch).__name__}."
        )
    return lambda model: model(batch.to(_device(view)))


def _device(view: Any) -> torch.device:
    """Where its input goes: where its first values are. What is offloaded has none here."""
    every = [p.device for p in view.parameters()]
    return next((device for device in every if device.type != "meta"), every[0])


@torch.no_grad()
def _output(call: Callable[[Any], Any], model: nn.Module) -> Tensor:
    """In evaluation mode: dropout would hide what is looked for."""
    training = model.training
    model.eval()
    try:
        return _tensor(call(model)).detach()
    finally:
        model.train(training)


def _tensor(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
    return out if isinstance(out, Tensor) else next(v for v in (out.values() if isinstance(out, Mapping) else out))


def _loss(out: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is not None:
        return loss(out)
    if isinstance(own := getattr(out, "loss", None), Tensor):
        return own
    values = _tensor(out).float().flatten()
    return (values * torch.linspace(-1, 1, len(values), device=values.device)).sum()


@torch.no_grad()
def _move(view: Any, names: Sequence[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in names:
        for p in view.get_adapter(name).parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator).to(p))


@contextmanager
def _restored(view: Any) -> Generator[None]:
    """Everything that a step changes is put back."""
    own = [p for p in view.parameters() if p.requires_grad]
    values, gradients = [p.detach().clone() for p in own], [p.grad for p in own]
    buffers = [(b, b.detach().clone()) for b in view.buffers()]
    training = [(m, m.training) for m in view.modules()]
    devices = [_device(view)] if _device(view).type == "cuda" else []
    for p in own:
        p.grad = None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for p, value, gradient in zip(own, values, gradients, strict=True):
                p.copy_(value)
                p.grad = gradient
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in training:
            module.training = mode
