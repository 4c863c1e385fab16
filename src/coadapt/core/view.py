"""A view of a base: what it owns, what is active in its calls, and how it looks to others (Trainer, TRL, pickle)."""

import functools
import inspect
import threading
import types
import weakref
from abc import ABC
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import torch
from torch import nn

from ..config import PeftConfig
from . import arguments, composition, distributed, driving, loss, routing, tied
from .adapter import Adapter, attribute, build, replace_options, sites_of
from .backbone import stacks
from .base import Base, base_of, statistics
from .compiling import not_traced, untraced
from .composition import Node, as_node
from .frame import Bare, Frame, current, entered
from .merging import Merged
from .method import method_for
from .plan import Plans
from .site import plain_class
from .slots import Slots, fits

_using = threading.local()
_STACKS, _SLOTS = ":stacks", ":slots"
"""Stand for routers and for compiled calls among those that need sites; no adapter can have these names."""


class View(nn.Module, ABC):
    """Adapters of its own on a base that others may share; `PeftModel` adds the verbs."""

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(_view_class(cls, plain_class(type(model))))

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "DataParallel copies its model to threads, which would lose the adapters. Use DistributedDataParallel."
            )
        self.base = model
        self.adapters = nn.Module()
        self.gates = nn.ModuleList()
        self._names: dict[str, Adapter] = {}
        self._node: Node = composition.Sum()
        self._merged: Merged | None = None
        self._begin()
        self.train(model.training)

    def _begin(self) -> None:
        self._plans = Plans(self.base, self._names)
        self._slots = Slots()
        self._sites: dict[str, list[nn.Module]] = {}
        self._record: Base = base_of(self.base)
        self._record.enter(id(self))
        self._finalizer = weakref.finalize(self, _leave, self._record, id(self), self._sites)

    def _install(self, adapter: Adapter) -> None:
        self._attach(adapter)
        self.adapters.add_module(attribute(adapter.name), adapter.train(self.training))
        self._names[adapter.name] = adapter
        self._plans.forget(adapter.name)  # what a call on another thread may have made of one that had this name

    def _attach(self, adapter: Adapter) -> None:
        driving.follow(adapter)
        self._sites[adapter.name] = [*sites_of(adapter), *self._record.checkpointing]
        self._record.attach(self._sites[adapter.name])

    def _prepare(self, node: Node) -> None:
        """Makes what the trained gates of a composition need. Raises ValueError where one cannot stand there."""
        routing.prepare(node, self._names, self.base)
        for gate in composition.trained_gates(node):
            gate.train(self.training)
        if routing.has_routers([node]) and _STACKS not in self._sites:
            self._sites[_STACKS] = [stack.module for stack in stacks(self.base)]
            self._record.attach(self._sites[_STACKS])
        if self._merged is None:
            self._plans.one(node, None)  # now: torch.compile would trace the making of it, and again without

    def _take_away(self, name: str) -> None:
        self._record.detach(self._sites.pop(name))
        delattr(self.adapters, attribute(name))
        del self._names[name]
        self._plans.forget(name)

    def _end(self) -> nn.Module:
        self._finalizer()
        self._names.clear()
        self._sites.clear()
        self.adapters = nn.Module()
        self._node = composition.Sum()
        self._plans.clear()
        return self.base

    def train(self, mode: bool = True) -> Self:
        """As of any module; but layers of the base that keep running statistics stay in evaluation mode, frozen too."""
        super().train(mode)
        for module in statistics(self.base):
            module.eval()
        return self

    # ---- what it is --------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "base" not in self._modules:
                raise
            base = self._modules["base"]
            found = getattr(base, name)
            return self._framed(found) if isinstance(found, types.MethodType) and found.__self__ is base else found

    def _framed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the base that runs as a call of this view: what it computes is adapted."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running(None, None, args, kwargs):
                return method(*args, **kwargs)

        return call

    def get_base_model(self) -> nn.Module:
        """The base itself: the same object that was given."""
        return self.base

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations of all attached adapters, by name."""
        return {name: adapter.config for name, adapter in self._names.items()}

    @property
    def composition(self) -> Node:
        """What is active in a call on this thread that does not say otherwise."""
        stack = getattr(_using, "stack", None)
        found = None if stack is None else stack.get(id(self))
        return found[-1] if found else self._node

    @property
    def active_adapters(self) -> list[str]:
        """The names in `composition`."""
        return composition.names(self.composition)

    @property
    def active_adapter(self) -> str:
        """The one active adapter. Raises ValueError where there are none or several: ask for `active_adapters`."""
        names = self.active_adapters
        if len(names) != 1:
            raise ValueError(f"{len(names)} adapters are active ({self.composition!r}); read active_adapters.")
        return names[0]

    @property
    def merged_adapters(self) -> list[str]:
        """The names of what is merged into the base's weights."""
        return [] if self._merged is None else composition.names(self._merged.node)

    def get_adapter(self, adapter_name: str) -> Adapter:
        """The module that holds an adapter's parameters; its `weight` is all of them as one vector."""
        composition.check_known(_literal(adapter_name, self._names), self._names)
        return self._names[adapter_name]

    # ---- calling -----------------------------------------------------------------------------------------------------

    def checked(self, adapters: Any, new: bool = False) -> Node:
        """A composition from what people write.

        Args:
            new: whether a text may make new gates that are trained.

        Raises:
            ValueError: a name that is not attached, a gate that cannot stand where it stands, or a text that would make
                new gates for one call.
        """
        node = adapters if isinstance(adapters, str) and adapters in self._names else as_node(adapters)
        composition.check_known(node, self._names)
        if not composition.trained_gates(node):
            return node
        if isinstance(adapters, str):
            if composition.same_text(node, self._node):
                return self._node
            if not new:
                raise ValueError(
                    f"{adapters!r} would make new gates, which nothing has trained, for one call. Make them active "
                    "with set_adapter first, or pass the composition as an object (Sum, Seq)."
                )
        self._prepare(node)
        return node

    @contextmanager
    def using(self, adapters: Any) -> Generator[Self]:
        """Context: `adapters` is active, on this thread only."""
        node = self.checked(adapters)
        stacks: dict[int, list[Node]] = _using.__dict__.setdefault("stack", {})
        stacks.setdefault(id(self), []).append(node)
        try:
            yield self
        finally:
            stacks[id(self)].pop()
            if not stacks[id(self)]:
                del stacks[id(self)]

    def disable_adapter(self) -> AbstractContextManager[Self]:
        """Context: nothing is active, on this thread only; calls give the base's own results."""
        return self.using(composition.Sum())

    @not_traced
    def forward(
        self,
        *args: Any,
        adapters: Any = None,
        adapter_names: Sequence[Any] | None = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward, adapted.

        Args:
            adapters: a composition for this call.
            adapter_names: one composition for each row of the batch (None or "__base__" for a row without any).
            task_ids: (B,) the task of each row, where a `TaskRouter` is in the composition, or an adapter for several
                tasks.
        """
        if torch.compiler.is_compiling():  # called by what is compiled
            with self.running(adapters, adapter_names, args, kwargs, task_ids) as plan:
                return distributed.joined(loss.called(plan, lambda told: self.base(*args, **told), kwargs, self.base))
        with untraced() as tracer:
            slots = tracer.compiles and not torch.is_grad_enabled()
            with self.running(adapters, adapter_names, args, kwargs, task_ids, slots) as plan:
                run = functools.partial(tracer.traced, self.base, args)
                return distributed.joined(loss.called(plan, run, kwargs, self.base))

    def generate(
        self,
        *args: Any,
        adapters: Any = None,
        adapter_names: Sequence[Any] | None = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base's `generate`, adapted; arguments as in `forward`. Beams follow the adapter of their row.

        The base itself can be its `assistant_model`: that one is not adapted.
        """
        base: Any = self.base
        if kwargs.get("assistant_model") is base:
            kwargs["assistant_model"] = Bare(base)
        with self.running(adapters, adapter_names, args, kwargs, task_ids) as plan:
            if plan.reads_last:
                arguments.refuse_uncached(base, args, kwargs)
            if plan.keeps_sums:
                arguments.refuse_beams(base, args, kwargs)
            if (frame := current()) is not None:
                frame.asked = arguments.length(args, kwargs)
            return base.generate(*args, **kwargs)

    def running(
        self,
        adapters: Any,
        names: Sequence[Any] | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        task_ids: Any = None,
        slots: bool = False,
    ) -> Any:
        """Context, of the plan: calls of the base are calls of this view, adapted as `forward` says."""
        record = self._record
        if record.merged_by not in (None, id(self)):
            raise RuntimeError(
                "Another view has merged its adapters into this base; unmerge_adapter() there before calling this one."
            )
        if names is None:
            nodes = [self.composition if adapters is None else self.checked(adapters)]
            plan, rows = self._plans.one(nodes[0], self._merged), None
        elif adapters is not None:
            raise ValueError("Give adapters (for the whole call) or adapter_names (one for each row), not both.")
        else:
            arguments.check_names(names, args, kwargs)
            nodes = [self._of_row(i, node) for i, node in enumerate(names)]
            plan, rows = self._plans.rows(nodes, self._merged)
        for method in () if torch.compiler.is_compiling() else plan.refreshed:
            method.refresh()
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            driving.check(self._names[name] for node in plan.nodes for name in composition.names(node))
        self._check_wrapper(plan.nodes)
        arguments.check_gates(plan, args, kwargs)
        if task_ids is not None and not plan.tasks and self._sets_by_task_aside(adapters, names):
            task_ids = None
        frame = plan.frame(rows, arguments.tasks(task_ids, plan, args, kwargs))
        if slots and self._merged is None:
            frame = self._slotted(nodes, args, kwargs) or frame
        context = entered(frame, plan=plan)
        return context if torch.compiler.is_compiling() else _Running(record, id(self), context)

    def running_rows(self, nodes: Sequence[Any], rows: Sequence[int]) -> Any:
        """Context, as `running`: calls of the base in which row b has the composition `nodes[rows[b]]`.

        What a composition needs is made ready for all of `nodes`, also for those that no row has this time: rows that
        change among the same `nodes` cost little. For inference, without gates per row and tasks.
        """
        checked = [self._of_row(i, node) for i, node in enumerate(nodes)]
        plan, where = self._plans.rows(checked, self._merged)
        for method in plan.refreshed:
            method.refresh()
        frame = plan.frame([where[i] for i in rows])
        return _Running(self._record, id(self), entered(frame, plan=plan))

    def _slotted(self, nodes: Sequence[Node], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Frame | None:
        """The frame of a compiled call without a backward, where all that is attached goes into slots."""
        used = dict.fromkeys(name for node in nodes for name in composition.names(node))
        if not used or not self._slots.fill(self._names, used):
            return None  # where nothing is active, the base has a graph of its own, without a thing in it
        self._keep_sites()
        mixture = self._slots.mixture(nodes)
        if mixture is None:
            return None
        rows = arguments.rows_of(args, kwargs) or 1
        frame = Frame(self._slots.calls, {}, None)
        frame.mixture = mixture if len(mixture) > 1 else mixture.expand(rows, -1).contiguous()
        return frame

    def _keep_sites(self) -> None:
        """What has slots stays a site when its adapters go: the class of a module is part of what was compiled."""
        held = self._sites.setdefault(_SLOTS, [])
        self._record.attach(more := [module for module in self._slots.layers if module not in held])
        held += more

    def reserve(self, adapters: int, config: PeftConfig) -> None:
        """Makes room for compiled calls without a backward: what fits into it changes no graph, whenever it comes.

        Without this there is room for what is attached, and each time it grows a compiled view compiles again.

        Args:
            adapters: how many are attached at a time.
            config: the largest of them: its rank, at all layers that any of them targets (`LoraConfig(r=64,
                target_modules="all-linear")`).

        Raises:
            TypeError: `config` is no configuration.
            ValueError: such an adapter has something that is no product of two factors at a linear layer, or does not
                fit the model; or `adapters` is no whole number of at least 1.
        """
        if type(adapters) is not int or adapters < 1:
            raise ValueError(f"reserve: adapters={adapters!r} must be a whole number of at least 1.")
        method_for(config)
        parts = build("reserve", replace_options(config, init_seed=0), self.base).parts
        if not all(map(fits, parts)):
            raise ValueError(
                f"{type(config).__name__}: only what has factors at linear layers can share one graph, such as LoRA."
            )
        rank = max(part.method.factors()[1].shape[1] for part in parts)  # type: ignore[union-attr]
        self._slots.reserve({part.place.module: part.place.path for part in parts}, adapters, rank)
        self._keep_sites()

    def _sets_by_task_aside(self, adapters: Any, names: Any) -> bool:
        """Whether `using` or `disable_adapter` stands for a composition that would read the batch's `task_ids`."""
        return adapters is None and names is None and routing.tasks([self._node], self._names) > 0

    def _check_wrapper(self, nodes: Sequence[Node]) -> None:
        members = {**self._names, "gates": self.gates}
        names = (name for node in nodes for name, _ in composition.terms(node, lambda _: True))
        distributed.check(members, names, (gate for node in nodes for gate in composition.trained_gates(node)))

    def _of_row(self, row: int, node: Any) -> Node:
        if node is None or node == "__base__":
            return composition.Sum()
        try:
            return self.checked(node)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapter_names[{row}]: {error}") from None

    # ---- state: adapters only ----------------------------------------------------------------------------------------

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The adapters and learned gates only, under attribute paths of this view; what sites share is there once."""
        destination = {} if destination is None else destination
        holder = self._own()
        destination |= tied.once(holder.state_dict(prefix=prefix, keep_vars=keep_vars), holder, prefix)
        destination[f"{prefix}_extra_state"] = self.get_extra_state()
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave; the base is not touched. Raises RuntimeError as PyTorch does."""
        state = dict(state_dict)
        extra = state.pop("_extra_state", None)
        if extra is not None:
            self.set_extra_state(extra)
        for adapter in self._names.values():
            driving.forget(adapter)
        holder = self._own()
        again = tied.aliases(holder)
        done = holder.load_state_dict(tied.everywhere(state, holder), strict=strict, assign=assign)
        for key, one in again.items() if assign else ():
            (path, _, name), (other, _, there) = key.rpartition("."), one.rpartition(".")
            setattr(holder.get_submodule(path), name, getattr(holder.get_submodule(other), there))
        return done

    def _own(self) -> nn.Module:
        """What a state of this view is of."""
        holder = nn.Module()
        holder.adapters, holder.gates = self.adapters, self.gates
        return holder

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {
            k: v for k, v in self.__dict__.items() if k not in ("_record", "_plans", "_slots", "_sites", "_finalizer")
        }
        names = {id(p): n for n, p in self.base.named_parameters()}
        state["_trained"] = [names[id(p)] for p in self._record.trained if id(p) in names]
        base = plain_class(type(self.base))
        return _rebuild, (type(self).__bases__[0], base), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        trained = state.pop("_trained")
        vars(self).update(state)
        self._begin()
        self._record.trained = [self.base.get_parameter(name) for name in trained]
        for adapter in self._names.values():
            self._attach(adapter)
        self._prepare(self._node)
        if self._merged is not None:
            self._record.merged_by = id(self)


class _Running:
    """Context: a view is in a call, which keeps others from merging; and its frame is the current one."""

    def __init__(self, record: Base, view: int, frame: entered) -> None:
        self.record, self.view, self.frame = record, view, frame

    def __enter__(self) -> Any:
        with self.record.lock:
            self.record.running[self.view] += 1
        return self.frame.__enter__()

    def __exit__(self, *error: object) -> None:
        self.frame.__exit__(*error)
        with self.record.lock:
            self.record.running[self.view] -= 1


def _literal(name: Any, known: Mapping[str, Any]) -> Node:
    """A name that is to be taken as it is, for an error that says what there is."""
    if not isinstance(name, str):
        raise TypeError(f"An adapter's name is a string; got a {type(name).__name__}.")
    return name


def _leave(record: Base, view: int, sites: Mapping[str, Sequence[nn.Module]]) -> None:
    record.leave(view, [module for modules in sites.values() for module in modules])


@functools.cache
def _view_class(cls: type[Any], base: type[nn.Module]) -> type[Any]:
    """`cls` with a forward whose signature is the base's, plus ours: Trainer, TRL and accelerate read it."""

    @not_traced
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = _signature(base.forward)  # type: ignore[attr-defined]
    return type(
        cls.__name__,
        (cls,),
        {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__},
    )


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    theirs = list(inspect.signature(forward).parameters.values())
    names = ("adapters", "adapter_names", "task_ids")
    ours = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in names]
    at = next((i for i, p in enumerate(theirs) if p.kind is inspect.Parameter.VAR_KEYWORD), len(theirs))
    return inspect.Signature([*theirs[:at], *ours, *theirs[at:]])


def _rebuild(cls: type[Any], base: type[nn.Module]) -> Any:
    made = _view_class(cls, base)
    return nn.Module.__new__(made)
