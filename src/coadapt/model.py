"""PeftModel: a view of a frozen base, with adapters of its own, and its verbs."""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from .config import PeftConfig, check_name
from .core import composition, merging
from .core.adapter import Adapter, attribute, build, replace_options
from .core.base import Base, base_of
from .core.composition import Node, as_node
from .core.frame import entered
from .core.plan import Plan
from .core.site import plain_class
from .formats import checkpoint, folder

_PLANS_KEPT = 64
_using = threading.local()


class PeftModel(nn.Module):
    """A view of a base model: adapters of its own, a composition of them that is active, and the base's interface.

    The base keeps its class, keys, weights and behaviour; several views can share it. What is active in a call is the
    call's `adapters` or `adapter_names`, else what `using` says on this thread, else what `set_adapter` said.

    Args:
        model: the base. It is frozen; when its last view goes, what trained before trains again.
        peft_config: the first adapter. Its name is `adapter_name`, or the configuration's own, or "default".
        autocast_adapter_dtype: keep the adapters in fp32 where the base is bf16 or fp16.
    """

    _hf_peft_config_loaded = True  # what transformers' Trainer asks of a model with a frozen, quantised base

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(_view_class(cls, plain_class(type(model))))

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | None = None, adapter_name: str | None = None, autocast_adapter_dtype: bool = True
    ) -> None:
        super().__init__()
        if isinstance(model, nn.DataParallel):
            raise TypeError("DataParallel copies its model to threads, which would lose the adapters. Use DistributedDataParallel.")
        self.base = model
        self.adapters = nn.Module()
        self.gates = nn.ModuleList()
        self._names: dict[str, Adapter] = {}
        self._node: Node = composition.Sum()
        self._merged: merging.Merged | None = None
        self.half_adapters = not autocast_adapter_dtype
        self._begin()
        self.train(model.training)
        if peft_config is not None:
            name = self._add(_name_for(peft_config, adapter_name), peft_config)
            self.set_adapter(name)

    def _begin(self) -> None:
        self._plans: dict[Any, Plan] = {}
        self._record: Base = base_of(self.base)
        self._record.enter(id(self))
        self._finalizer = weakref.finalize(self, _leave, self._record, id(self), self._names)

    # ---- what it is --------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "base" not in self._modules:
                raise
            return getattr(self._modules["base"], name)

    @property
    def base_model(self) -> "BaseModel":
        """The base's attributes and the view's verbs: what `model.base_model.set_adapter([...])` in the field needs."""
        return BaseModel(self)

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

    def get_adapter(self, adapter_name: str) -> Adapter:
        """The module that holds an adapter's parameters; its `weight` is all of them as one vector."""
        composition.check_known(_literal(adapter_name, self._names), self._names)
        return self._names[adapter_name]

    # ---- attaching and taking away -----------------------------------------------------------------------------------

    def add_adapter(
        self, adapter_name: str, peft_config: PeftConfig, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        """Attaches a new adapter. What is active and what trains stay as they are.

        Args:
            low_cpu_mem_usage: taken as in the field; parameters are made on their device at once either way.

        Raises:
            ValueError: the name is taken or cannot be one, or the configuration does not fit the model.
        """
        before, self.half_adapters = self.half_adapters, not autocast_adapter_dtype
        try:
            self._add(_name_for(peft_config, adapter_name), peft_config)
        finally:
            self.half_adapters = before

    def _add(self, name: str, config: PeftConfig) -> str:
        check_name(name)
        if name in self._names:
            raise ValueError(f"There is an adapter {name!r} already. Pick another name, or delete_adapter({name!r}) first.")
        if self._merged is not None:
            raise RuntimeError("Adapters are merged into the base; unmerge_adapter() before another one is attached.")
        source = None
        if config.init_from is not None:
            source = self.get_adapter(config.init_from)
        adapter = build(name, config, self.base, self.half_adapters)
        if source is not None:
            _start_from(adapter, source)
        adapter.config = replace_options(adapter.config, base_model_name_or_path=config.base_model_name_or_path or self._base_name())
        self._install(adapter)
        return name

    def _base_name(self) -> str | None:
        return getattr(self.base, "name_or_path", None) or None

    def _install(self, adapter: Adapter) -> None:
        self._record.attach(_modules_of(adapter, self.base))
        self.adapters.add_module(attribute(adapter.name), adapter.train(self.training))
        self._names[adapter.name] = adapter
        self._plans.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter away; a composition that uses it goes on without it.

        Raises:
            RuntimeError: adapters are merged into the base.
        """
        adapter = self.get_adapter(adapter_name)
        if self._merged is not None:
            raise RuntimeError("Adapters are merged into the base; unmerge_adapter() before one is deleted.")
        self._record.detach(_modules_of(adapter, self.base))
        delattr(self.adapters, attribute(adapter_name))
        del self._names[adapter_name]
        self._plans.clear()
        self.set_adapter(_without(self._node, adapter_name))

    def unload(self) -> nn.Module:
        """Takes all adapters away and gives the base back, to the bit as it was (merged weights are taken out first)."""
        if self._merged is not None:
            self.unmerge_adapter()
        return self._end()

    def _end(self) -> nn.Module:
        self._finalizer()
        self._names.clear()
        self.adapters = nn.Module()
        self._node, self._plans = composition.Sum(), {}
        return self.base

    # ---- what is active ----------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: Any) -> None:
        """Makes a composition active: a name, a list (their sum), a text ("task + 0.5*style", "a >> b"), Seq or Sum.

        What trains stays as it is: see `freeze`, `unfreeze`, `trainable`.
        """
        node = self._checked(adapter_name)
        if self._merged is not None and composition.key(node) != composition.key(self._merged.node):
            raise RuntimeError(f"{self._merged.node!r} is merged into the base; unmerge_adapter() before another is made active.")
        self._node = node
        self.gates = nn.ModuleList(composition.learned(node))

    def _checked(self, adapters: Any) -> Node:
        node = adapters if isinstance(adapters, str) and adapters in self._names else as_node(adapters)
        composition.check_known(node, self._names)
        return node

    @contextmanager
    def using(self, adapters: Any) -> Iterator[Self]:
        """Context: `adapters` is active, on this thread only."""
        node = self._checked(adapters)
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

    # ---- calling -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapters: Any = None, adapter_names: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """The base's forward, adapted.

        Args:
            adapters: a composition for this call.
            adapter_names: one composition for each row of the batch (None or "__base__" for a row without any).
        """
        with self._call(adapters, adapter_names, args, kwargs):
            return self.base(*args, **kwargs)

    def generate(self, *args: Any, adapters: Any = None, adapter_names: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        """The base's `generate`, adapted; arguments as in `forward`. Beams and repeats follow the adapter of their row."""
        base: Any = self.base
        with self._call(adapters, adapter_names, args, kwargs):
            return base.generate(*args, **kwargs)

    def _call(self, adapters: Any, names: Sequence[Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        record = self._record
        if record.merged_by not in (None, id(self)):
            raise RuntimeError("Another view has merged its adapters into this base; unmerge_adapter() there before calling this one.")
        if names is None:
            node = self.composition if adapters is None else self._checked(adapters)
            plan, rows = self._plan([node]), None
        elif adapters is not None:
            raise ValueError("Give adapters (for the whole call) or adapter_names (one for each row), not both.")
        else:
            plan, rows = self._plan_rows(names, args, kwargs)
        if torch.compiler.is_compiling():
            return entered(plan.frame(rows))
        record.carry_frames()
        return _Running(record, id(self), entered(plan.frame(rows)))

    def _plan_rows(self, names: Sequence[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Plan, Tensor]:
        if isinstance(names, str):
            raise TypeError(f"adapter_names is a list with one composition for each row; {names!r} is one string. Did you mean adapters=?")
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
        if tensors and len(tensors[0]) != len(names):
            raise ValueError(f"adapter_names has {len(names)} entries, but the batch has {len(tensors[0])} rows; it needs one for each row.")
        nodes = [composition.Sum() if n is None or n == "__base__" else self._checked(n) for n in names]
        distinct = {composition.key(n): n for n in nodes}
        where = {k: i for i, k in enumerate(sorted(distinct, key=str))}
        plan = self._plan([distinct[k] for k in where])
        return plan, torch.tensor([where[composition.key(n)] for n in nodes])

    def _plan(self, nodes: Sequence[Node]) -> Plan:
        merged = self._merged
        if merged is not None and any(composition.key(n) != composition.key(merged.node) for n in nodes):
            raise RuntimeError(f"{merged.node!r} is merged into the base; unmerge_adapter() before calling with {nodes[0]!r}.")
        key = tuple(composition.key(n) for n in nodes)
        plan = self._plans.get(key)
        if plan is None:
            plan = Plan(self.base, self._names, nodes, merged.modules if merged else frozenset())
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return plan

    # ---- what trains -------------------------------------------------------------------------------------------------

    def freeze(self, *adapter_names: str) -> None:
        """These adapters (all, if none is named) get no gradients from now on."""
        for name in adapter_names or self._names:
            self.get_adapter(name).requires_grad_(False)

    def unfreeze(self, *adapter_names: str) -> None:
        """These adapters (all, if none is named) get gradients from now on."""
        for name in adapter_names or self._names:
            self.get_adapter(name).requires_grad_(True)

    def trainable(self, *adapter_names: str) -> list[str]:
        """The adapters that train; given names, exactly those train from now on."""
        if adapter_names:
            for name in adapter_names:
                self.get_adapter(name)
            for name, adapter in self._names.items():
                adapter.requires_grad_(name in adapter_names)
        return [name for name, adapter in self._names.items() if any(p.requires_grad for p in adapter.parameters())]

    def param_groups(self, options: Mapping[str, float | Mapping[str, Any]] | None = None) -> list[dict[str, Any]]:
        """One optimiser group for each adapter that trains, and one for learned gates: `AdamW(model.param_groups({...}))`.

        Args:
            options: adapter name -> learning rate, or a dict of the optimiser's options. `"gates"` names the gates.

        Raises:
            ValueError: a name that is no adapter, or one that does not train.
        """
        given = dict(options or {})
        members = {name: [p for p in adapter.parameters() if p.requires_grad] for name, adapter in self._names.items()}
        members["gates"] = [p for p in self.gates.parameters() if p.requires_grad] if "gates" not in self._names else members["gates"]
        for name in given:
            if name != "gates":
                self.get_adapter(name)
            if not members.get(name):
                raise ValueError(f"param_groups: {name!r} has nothing that trains, so its options would have no effect. unfreeze it first.")
        groups: list[dict[str, Any]] = []
        for name, parameters in members.items():
            if parameters:
                own = given.get(name, {})
                groups.append({"params": parameters, "name": name, **(own if isinstance(own, Mapping) else {"lr": own})})
        return groups

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that train, all parameters)"""
        every = list(self.parameters())
        return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)

    def print_trainable_parameters(self) -> None:
        """Prints both numbers and their ratio."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    # ---- merging -----------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Any = None, safe_merge: bool = True, keep_original: bool = True) -> None:
        """Puts a composition (the active one) into the base's weights. Prompts and prefixes stay beside them.

        Args:
            adapter_names: what to merge, as in `set_adapter`; it becomes the active composition.
            safe_merge: taken as in the field; results are checked to be finite before anything is written either way.
            keep_original: keep the base's own weights (on the CPU) for an exact `unmerge_adapter`.

        Raises:
            RuntimeError: something is merged already, or another view is in a call.
            TypeError, ValueError: the composition cannot be merged; nothing was changed.
        """
        record = self._record
        with record.lock:
            if record.merged_by is not None:
                raise RuntimeError("Adapters are merged into this base already; unmerge_adapter() first.")
            if busy := [view for view in record.running if record.running[view] > 0]:
                raise RuntimeError(f"{len(busy)} view of this base is in a call right now; merge when it is done.")
            node = self.composition if adapter_names is None else self._checked(adapter_names)
            _ = record.fingerprint  # of the base as it is before
            self._merged = merging.merge(self.base, self._names, node, keep_original)
            record.merged_by = id(self)
            self._plans.clear()
            self.set_adapter(node)

    def unmerge_adapter(self) -> None:
        """Puts the base's own weights back, bit for bit.

        Raises:
            RuntimeError: nothing is merged, or the originals were given up.
        """
        if self._merged is None:
            raise RuntimeError("Nothing is merged.")
        if not self._merged.kept:
            raise RuntimeError("merge_adapter(keep_original=False) gave the base's own weights up; they cannot be put back.")
        merging.unmerge(self._merged)
        self._merged, self._record.merged_by = None, None
        self._plans.clear()

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Any = None) -> nn.Module:
        """Merges a composition for good and gives the base back, without adapters.

        Raises:
            TypeError: part of it is no change of weights (a prompt, a prefix, a bottleneck): it would be lost.
        """
        if self._merged is None:
            node = self.composition if adapter_names is None else self._checked(adapter_names)
            merging.refuse_beside(self._names, node)
            self.merge_adapter(node, keep_original=False)
        merging.untie(self.base)
        self._merged = None
        return self._end()

    # ---- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto", is_main_process: bool = True, state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Writes the adapters: one that is called "default" into the folder itself, others into sub-folders by name.

        With several, or another composition than one adapter alone, `composition.json` says what is active.

        Raises:
            ValueError: `safe_serialization=False` (pickles are not written), or an option that would have no effect.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for a pickle; coadapt writes safetensors only.")
        if save_embedding_layers not in ("auto", False):
            raise ValueError("save_embedding_layers: resized embeddings are not written yet; put them in modules_to_save.")
        if not is_main_process:
            return
        chosen = list(selected_adapters or self._names)
        adapters = {name: self.get_adapter(name) for name in chosen}
        node = self._node if set(composition.names(self._node)) <= set(chosen) else composition.Sum(*chosen)
        folder.save(Path(save_directory), adapters, node, self.base, self._record.fingerprint)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | Path, adapter_name: str | None = None, is_trainable: bool = False,
        config: PeftConfig | None = None, autocast_adapter_dtype: bool = True, subfolder: str | None = None, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """A view of `model` with what a folder holds: one adapter, a composition, or a Trainer's checkpoint.

        Args:
            model: the base, or a view, to which the adapters are added.
            adapter_name: for a folder with one adapter; "default" if left out.
            is_trainable: attach it to be trained on; frozen, and in evaluation mode, otherwise.

        Raises:
            FileNotFoundError, ValueError: no adapter there, one for another model, or tensors missing, left over or of
                other shapes (all are listed). Nothing is attached then.
        """
        unused = {k: v for k, v in kwargs.items() if k not in ("low_cpu_mem_usage", "torch_device", "revision") and v}
        if unused:
            raise TypeError(f"from_pretrained has no option {', '.join(unused)}.")
        view = model if isinstance(model, PeftModel) else cls(model, None, autocast_adapter_dtype=autocast_adapter_dtype)
        where = Path(model_id, subfolder or "")
        try:
            node = view._load(where, adapter_name, is_trainable, config)
        except BaseException:
            if view is not model:
                view._end()
            raise
        view.set_adapter(node)
        if not is_trainable:
            view.eval()
        return view  # type: ignore[return-value]

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> None:
        """Attaches an adapter from its folder. What is active stays as it is. Raises as `from_pretrained`."""
        if unused := {k for k, v in kwargs.items() if k not in ("low_cpu_mem_usage", "torch_device", "autocast_adapter_dtype") and v}:
            raise TypeError(f"load_adapter has no option {', '.join(unused)}.")
        self._load(Path(model_id), adapter_name, is_trainable, None)

    def _load(self, where: Path, name: str | None, is_trainable: bool, config: PeftConfig | None) -> Node:
        found = folder.load(where, self.base, self._record.fingerprint, name, config, is_trainable, self.half_adapters)
        for adapter in found.adapters:
            if adapter.name in self._names:
                raise ValueError(f"There is an adapter {adapter.name!r} already; load it under another adapter_name.")
        for adapter in found.adapters:
            self._install(adapter)
        return found.node

    # ---- state: adapters only ----------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Configurations, composition and fingerprint, as JSON in a uint8 tensor."""
        return checkpoint.describe(self._names, self._node, self._record.fingerprint)

    def set_extra_state(self, state: Tensor) -> None:
        """Checks that the state is of a view like this one. Raises ValueError where it is not."""
        checkpoint.compare(state, self._names)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """The adapters and learned gates only, under attribute paths of this view."""
        destination = {} if destination is None else destination
        self.adapters.state_dict(destination=destination, prefix=f"{prefix}adapters.", keep_vars=keep_vars)
        self.gates.state_dict(destination=destination, prefix=f"{prefix}gates.", keep_vars=keep_vars)
        destination[f"{prefix}_extra_state"] = self.get_extra_state()
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave; the base is not touched. Raises RuntimeError as PyTorch does."""
        state = dict(state_dict)
        extra = state.pop("_extra_state", None)
        if extra is not None:
            self.set_extra_state(extra)
        holder = nn.Module()
        holder.adapters, holder.gates = self.adapters, self.gates
        return holder.load_state_dict(state, strict=strict, assign=assign)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {k: v for k, v in self.__dict__.items() if k not in ("_record", "_plans", "_finalizer")}
        names = {id(p): n for n, p in self.base.named_parameters()}
        state["_trained"] = [names[id(p)] for p in self._record.trained if id(p) in names]
        base = plain_class(type(self.base))
        return _rebuild, (type(self).__mro__[1], base), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        trained = state.pop("_trained")
        self.__dict__.update(state)
        self._begin()
        self._record.trained = [self.base.get_parameter(name) for name in trained]
        for adapter in self._names.values():
            self._record.attach(_modules_of(adapter, self.base))
        if self._merged is not None:
            self._record.merged_by = id(self)


class BaseModel:
    """What `view.base_model` is: the base's attributes, and the view's verbs where it has one of that name."""

    def __init__(self, view: PeftModel) -> None:
        self.__dict__["_view"] = view

    def __getattr__(self, name: str) -> Any:
        view: PeftModel = self.__dict__["_view"]
        return getattr(view if name in PeftModel.__dict__ else view.base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_view"](*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self.__dict__["_view"].base)


class _Running:
    """Context: a view is in a call, which keeps others from merging; and its frame is the current one."""

    def __init__(self, record: Base, view: int, frame: entered) -> None:
        self.record, self.view, self.frame = record, view, frame

    def __enter__(self) -> None:
        with self.record.lock:
            self.record.running[self.view] += 1
        self.frame.__enter__()

    def __exit__(self, *error: object) -> None:
        self.frame.__exit__(*error)
        with self.record.lock:
            self.record.running[self.view] -= 1


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str | None = None, mixed: bool = False, autocast_adapter_dtype: bool = True,
    revision: str | None = None, low_cpu_mem_usage: bool = False,
) -> PeftModel:  # fmt: skip
    """A view of `model` with one adapter; given a view, that view with the adapter added to what is active.

    Args:
        adapter_name: left out, the configuration's own name or "default" (or, where that is taken, the method's name).
        mixed: taken as in the field; every view can mix methods.
        low_cpu_mem_usage: taken as in the field; parameters are made on their device at once either way.

    Raises:
        TypeError, ValueError: the configuration or its name does not fit; nothing was changed.
    """
    if revision is not None:
        peft_config = replace_options(peft_config, revision=revision)
    if not isinstance(model, PeftModel):
        return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)
    name = _name_for(peft_config, adapter_name)
    if adapter_name is None and peft_config.adapter_name is None and name in model.peft_config:
        kind = str(peft_config.peft_type).lower()
        tried = [kind, *(f"{kind}_{i}" for i in range(2, 1000))]
        name = next(n for n in tried if n not in model.peft_config)
    model.add_adapter(name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
    active = model.composition
    model.set_adapter(composition.Sum(active, name) if composition.names(active) else name)
    return model


def _name_for(config: PeftConfig, given: str | None) -> str:
    own = getattr(config, "adapter_name", None)
    if own is not None and given is not None and own != given:
        raise ValueError(f"The configuration names its adapter {own!r}, the call {given!r}. Give one name.")
    return given or own or "default"


def _literal(name: Any, known: Mapping[str, Any]) -> Node:
    """A name that is to be taken as it is, for an error that says what there is."""
    if not isinstance(name, str):
        raise TypeError(f"An adapter's name is a string; got a {type(name).__name__}.")
    return name


def _without(node: Node, name: str) -> Node:
    if isinstance(node, str):
        return composition.Sum() if node == name else node
    left = [(c, w) for c, w in zip(node.children, getattr(node, "weights", node.children), strict=True) if c != name]
    children = [_without(c, name) for c, _ in left]
    if isinstance(node, composition.Seq):
        return composition.Seq(*children)
    return composition.Sum(*children, weights=[w for _, w in left])


def _modules_of(adapter: Adapter, base: nn.Module) -> list[nn.Module]:
    """Every module that an adapter needs as a site."""
    from .core.input import backbones
    from .core.method import AttentionMethod

    found = [p.place.module for p in adapter.parts]
    found += [p.place.reads[1] for p in adapter.parts if p.place.reads]
    if any(isinstance(p.method, AttentionMethod) and p.method.position_offset for p in adapter.parts):
        found += [b.module for b in backbones(base)]
    if any(p.place.role == "encoder" for p in adapter.parts):  # a decoder sees the virtual tokens of its encoder
        found += [b.module for b in backbones(base)]
    return list(dict.fromkeys(found))


def _start_from(adapter: Adapter, source: Adapter) -> None:
    own, other = adapter.state_dict(), source.state_dict()
    wrong = [k for k in own.keys() | other.keys() if k not in own or k not in other or own[k].shape != other[k].shape]
    if wrong:
        raise ValueError(
            f"init_from={source.name!r}: its parameters are not of the same names and shapes; {len(wrong)} differ, {sorted(wrong)[0]!r} among them."
        )
    adapter.load_state_dict(other)


def _leave(record: Base, view: int, adapters: Mapping[str, Adapter]) -> None:
    modules = [m for adapter in adapters.values() for m in _modules_of(adapter, record.model)] if adapters else []
    record.leave(view, modules)


@functools.cache
def _view_class(cls: type[PeftModel], base: type[nn.Module]) -> type[PeftModel]:
    """`cls` with a forward whose signature is the base's, plus ours: Trainer, TRL and accelerate read it."""

    def forward(self: PeftModel, *args: Any, adapters: Any = None, adapter_names: Any = None, **kwargs: Any) -> Any:
        return PeftModel.forward(self, *args, adapters=adapters, adapter_names=adapter_names, **kwargs)

    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = _signature(base.forward)  # type: ignore[attr-defined]
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    theirs = list(inspect.signature(forward).parameters.values())
    ours = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("adapters", "adapter_names")]
    at = next((i for i, p in enumerate(theirs) if p.kind is inspect.Parameter.VAR_KEYWORD), len(theirs))
    return inspect.Signature([*theirs[:at], *ours, *theirs[at:]])


def _rebuild(cls: type[PeftModel], base: type[nn.Module]) -> PeftModel:
    made = _view_class(cls, base)
    return nn.Module.__new__(made)
