"""Adapters in place: plain calls of a model, and of its parts, are calls of a view of it."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from coadapt.config import PeftConfig, TargetedConfig, VirtualTokensConfig
from coadapt.core.adapter import Adapter, attribute, replace_options
from coadapt.core.composition import Sum, names
from coadapt.core.frame import current, go_on_with
from coadapt.core.site import ENTRANCE
from coadapt.formats.entry import Entry
from coadapt.formats.keys import entries
from coadapt.formats.vocabulary import ROOT

from .configs import INJECTED, injected_as, without_injected
from .views import PeftModel

_ENTRANCES = ":entrances"
"""Stands for the modules by which calls come in, among those that need sites; no adapter can have this name."""

_SHADOWS = ("generate", "__deepcopy__")
"""Attributes of a model with adapters that stand before its class's own."""


class Stored(nn.Module):
    """An injected adapter as its model holds it: its parameters, and its state by the keys of its file.

    Those keys have "/" for "."; a parameter that is set by such a name is written into the adapter.
    """

    adapter: Adapter

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(adapter=adapter, _model=model)
        self._hold()

    def _hold(self) -> None:
        self.__dict__["_entries"] = None
        for name, value in self.adapter.named_parameters():
            self._parameters[name.replace(".", "/")] = value

    def stored(self) -> Mapping[str, Entry]:
        """What the adapter's file holds, by its keys with "/" for "."."""
        if self.__dict__["_entries"] is None:
            found = entries(self.adapter, self.__dict__["_model"])
            self.__dict__["_entries"] = {e.key.removeprefix(ROOT).replace(".", "/"): e for e in found}
        return self.__dict__["_entries"]

    def __getattr__(self, name: str) -> Any:
        if "/" in name and name not in self._parameters and (entry := self.stored().get(name)) is not None:
            return entry.read()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "/" in name and (entry := self.stored().get(name)) is not None:
            entry.write(value.detach())
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        destination.update((prefix + name, entry.read()) for name, entry in self.stored().items())
        return destination

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known = {prefix + name: entry for name, entry in self.stored().items()}
        missing_keys += [key for key in known if key not in state_dict]
        for key in state_dict.keys() & known.keys():
            if state_dict[key].shape != known[key].shape:
                error_msgs.append(f"{key} is {tuple(state_dict[key].shape)}; the model needs {known[key].shape}.")
            else:
                known[key].write(state_dict[key])
        unexpected_keys += [k for k in state_dict if strict and k.startswith(prefix) and k not in known]

    def _apply(self, fn: Any, recurse: bool = True) -> "Stored":
        self.adapter._apply(fn, recurse)
        self._hold()
        return self

    def train(self, mode: bool = True) -> "Stored":
        super().train(mode)
        self.adapter.train(mode)
        return self


class BaseTunerLayer(nn.Module):
    """What other programs look for to steer adapters: one of it speaks for all of a model."""

    r: Mapping[str, int]


class _Calls(threading.local):
    def __init__(self) -> None:
        self.frames: list[Any] = []  # of frames: those that are running, innermost last


class Injected(BaseTunerLayer):
    """The adapters of a model, and the verbs by which transformers and diffusers steer them."""

    view: PeftModel

    def __init__(self, model: nn.Module, view: PeftModel | None = None) -> None:
        super().__init__()
        self.__dict__["view"] = PeftModel(model) if view is None else view
        self._active: list[str] = []
        self._weights: dict[str, float] = {}
        self._enabled = True
        self._calls = _Calls()

    @contextmanager
    def running(self, adapters: Any, rows: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Context: a call of the model, or of a part of it, is one of the view. The arguments are as in the view's."""
        with self.view.running(adapters, rows, args, kwargs):
            self._calls.frames.append(current())
            try:
                yield
            finally:
                self._calls.frames.pop()

    # ---- attaching ---------------------------------------------------------------------------------------------------

    def add(self, config: PeftConfig, name: str) -> None:
        """Attaches an adapter, and lets every module that holds one of its sites be called as it is."""
        with without_injected(self.view.base):
            self.view.add_adapter(name, config)
        self.hold(name)
        self.set_adapter(name)

    def hold(self, name: str) -> None:
        """Has an adapter of the view stand in the model."""
        view = self.view
        model = view.base
        with without_injected(model):
            sites = {id(module) for module in view._sites[name]}
            modules = dict(model.named_modules())
        adapter = view.get_adapter(name)
        paths = {path for path, module in modules.items() if id(module) in sites}
        above = {path[:i] for path in paths for i, sign in enumerate(path) if sign == "."} | paths | {""}
        held = view._sites.setdefault(_ENTRANCES, [])
        more = [modules[path] for path in sorted(above) if _is_called(modules[path]) and modules[path] not in held]
        view._record.attach(more)
        held += more
        for module in more:
            module.__dict__[ENTRANCE] = self
        if hasattr(type(model), "generate"):
            model.__dict__["generate"] = self._generate
        model.__dict__["__deepcopy__"] = self.copied
        self.add_module(attribute(name), Stored(adapter, model))
        self._weights.setdefault(name, 1.0)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate` as one call of the view, which refuses what would come out wrong."""
        if current() is None:
            return self.view.generate(*args, **kwargs)
        model: Any = self.view.base
        return type(model).generate(model, *args, **kwargs)

    def of(self, attribute_name: str) -> Stored:
        """What holds an adapter, by its name as an attribute."""
        found = self._modules[attribute_name]
        assert isinstance(found, Stored)
        return found

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter away; with the last one the model is as it was."""
        self.view.delete_adapter(adapter_name)
        delattr(self, attribute(adapter_name))
        del self._weights[adapter_name]
        self._active = [name for name in self._active if name != adapter_name]
        if self._weights:
            self._use()
        else:
            self.get_base_layer()

    def exchange(self, adapter: Adapter) -> None:
        """Puts another adapter into the place of the one of its name; what is active stays."""
        self.view.exchange(adapter)
        delattr(self, attribute(adapter.name))
        self.hold(adapter.name)

    # ---- copies ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _as_a_view(self) -> Iterator[PeftModel]:
        """Context: the view, of a model that is called as its own again, which both can be copied and pickled."""
        model = self.view.base
        modules = self.view._sites.get(_ENTRANCES, [])
        kept = {name: model.__dict__.pop(name) for name in _SHADOWS if name in model.__dict__}
        for module in modules:
            module.__dict__.pop(ENTRANCE, None)
        try:
            with without_injected(model):
                yield self.view
        finally:
            model.__dict__.update(kept)
            for module in modules:
                module.__dict__[ENTRANCE] = self

    def copied(self, memo: dict[int, Any]) -> nn.Module:
        """The model's `__deepcopy__`: with adapters of its own. Not while another thread calls the model."""
        with self._as_a_view() as view:
            return _with_adapters(copy.deepcopy(view, memo), *self._steered())

    def reduced(self, module: nn.Module) -> tuple[Any, ...]:
        """How the model is pickled. Raises TypeError for a part of it, which would lose its adapters."""
        if module is not self.view.base:
            raise TypeError(
                f"This {type(module).__name__} is a part of a model with injected adapters, which belong to the whole: "
                "copy or pickle the model."
            )
        with self._as_a_view() as view:
            return _unpickled, (pickle.dumps(view), *self._steered())

    def _steered(self) -> tuple[list[str], dict[str, float], bool]:
        return list(self._active), dict(self._weights), self._enabled

    # ---- taking off --------------------------------------------------------------------------------------------------

    @property
    def base_layer(self) -> nn.Module:
        """The model, for programs that ask whether there is something to take off."""
        return self.view.base

    def get_base_layer(self) -> None:
        """Takes all adapters off: nothing stays in this module's place."""
        self._take_off(self.view.unload)

    def merge_and_unload(self, **options: Any) -> None:
        """Merges what is active into the model's weights for good, and takes all adapters off."""

        def merged() -> nn.Module:
            with without_injected(self.view.base):
                return self.view.merge_and_unload(**options)

        self._take_off(merged)

    def _take_off(self, how: Callable[[], nn.Module]) -> None:
        entrances = list(self.view._sites.get(_ENTRANCES, ()))
        model = how()
        for module in entrances:
            module.__dict__.pop(ENTRANCE, None)
        for name in _SHADOWS:
            model.__dict__.pop(name, None)
        model._modules[INJECTED] = None  # not taken out: others call this while they go through these

    # ---- steering ----------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these active, and no others. What trains stays as it is."""
        self._active = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._use()

    def enable_adapters(self, enabled: bool) -> None:
        """Whether what is active takes part in calls."""
        self._enabled = enabled
        self._use()

    def set_scale(self, adapter: str, scale: float) -> None:
        """The weight of an adapter among those that are active."""
        if not isinstance(scale, int | float):
            raise TypeError(f"set_scale: one number for all of an adapter's layers is read; got {scale!r}.")
        self._weights[adapter] = float(scale)
        self._use()

    def scale_layer(self, scale: float) -> None:
        """Multiplies the weights of what is active."""
        for name in self._active:
            self._weights[name] *= scale
        self._use()

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the weights of what is active; makes them 1 where no number is given."""
        for name in self._active:
            self._weights[name] = 1.0 if scale is None else self._weights[name] / scale
        self._use()

    def _use(self) -> None:
        used = self._active if self._enabled else []
        weights = [self._weights[name] for name in used]
        self.view.set_adapter(Sum(*used, weights=weights) if weights != [1.0] else used[0])
        self.view._plans.one(
            self.view.composition, self.view._merged
        )  # now: torch.compile would trace the making of it
        frames = self._calls.frames
        if frames and current() is frames[-1]:  # diffusers sets scales inside of a model's forward
            with self.view.running(None, None, (), {}):
                frames[-1] = current()
            go_on_with(frames[-1])

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Puts what is active, or these, into the model's weights."""
        if adapter_names is None:
            self.view.merge_adapter()
            return
        weights = [self._weights[name] for name in adapter_names]
        self.view.merge_adapter(Sum(*adapter_names, weights=weights))

    def unmerge(self) -> None:
        """Puts the model's own weights back, bit for bit."""
        self.view.unmerge_adapter()

    @property
    def merged(self) -> bool:
        """Whether adapters are merged into the weights."""
        return self.view._merged is not None

    @property
    def merged_adapters(self) -> list[str]:
        """The names of what is merged into the weights."""
        return names(self.view.composition) if self.merged else []

    @property
    def active_adapters(self) -> list[str]:
        """The names of what is active."""
        return list(self._active)

    @property
    def active_adapter(self) -> list[str]:
        """The same, by its older name."""
        return list(self._active)

    @property
    def disable_adapters(self) -> bool:
        """Whether nothing takes part in calls."""
        return not self._enabled

    @property
    def r(self) -> dict[str, int]:  # type: ignore[override]
        """The adapters' ranks by their names (1 where a method has none)."""
        return {name: getattr(config, "r", 1) for name, config in self.view.peft_config.items()}

    def requires_grad_(self, requires_grad: bool = True) -> "Injected":
        """Of what is active, which is what transformers has just loaded when it calls this; the others stay."""
        for name in self._active:
            self.view.get_adapter(name).requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> "Injected":
        self.view.training = mode
        return super().train(mode)


def _with_adapters(view: PeftModel, active: list[str], weights: dict[str, float], enabled: bool) -> nn.Module:
    """The base of a view, with the view's adapters injected into it."""
    model: Any = view.base
    holder = Injected(model, view)
    model.add_module(INJECTED, holder)
    for name, config in list(view.peft_config.items()):
        holder.hold(name)
        config = model.peft_config.setdefault(name, config)
        injected_as(config, view.get_adapter(name), model)
    holder._active, holder._weights, holder._enabled = active, weights, enabled
    holder._use()
    holder.train(model.training)
    return model


def _unpickled(view: bytes, *steered: Any) -> nn.Module:
    return _with_adapters(pickle.loads(view), *steered)


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def injected(model: nn.Module) -> Injected:
    """What holds a model's injected adapters. Raises ValueError where there are none."""
    found = model._modules.get(INJECTED)
    if not isinstance(found, Injected):
        raise ValueError(f"There are no adapters in this {type(model).__name__}; inject_adapter_in_model first.")
    return found


def view_of(model: nn.Module) -> PeftModel:
    """The view that a model is, or whose adapters are injected into it. Raises ValueError where there is none."""
    return model if isinstance(model, PeftModel) else injected(model).view


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Puts an adapter into a model, which is adapted from then on wherever it, or a part of it, is called.

    Its weights, its keys and the classes of its layers stay as they are; the adapter's parameters are the model's, too.
    The new adapter is the one that is active, as there.

    Args:
        low_cpu_mem_usage: taken as there; parameters are made on their device at once either way.
        state_dict: of the adapter, whose keys say where it sits.

    Raises:
        ValueError: as `PeftModel.add_adapter`; or virtual tokens, which cannot be injected.
    """
    if isinstance(peft_config, VirtualTokensConfig):
        raise ValueError(
            f"{type(peft_config).__name__} puts virtual tokens in front, which needs a call of the whole model: use "
            "get_peft_model(model, config)."
        )
    config = peft_config if state_dict is None else placed(peft_config, state_dict)
    new = model._modules.get(INJECTED) is None
    holder = Injected(model) if new else injected(model)
    if new:
        model.add_module(INJECTED, holder)
    try:
        holder.add(config, adapter_name)
    except BaseException:
        if new:
            holder.get_base_layer()
        raise
    known = cast(Any, model)
    if new or not isinstance(getattr(model, "peft_config", None), dict):
        known.peft_config = {}
    known.peft_config[adapter_name] = peft_config
    injected_as(peft_config, holder.view.get_adapter(adapter_name), model)
    return model


def placed(config: PeftConfig, state: Mapping[str, Tensor]) -> PeftConfig:
    """The configuration with targets, and the ranks that are given for some, as the keys of a state dict have them."""
    if not isinstance(config, TargetedConfig) or not str(config.peft_type).isupper():
        return config
    mark = f".{str(config.peft_type).lower()}_"
    paths = list(dict.fromkeys(key.removeprefix(ROOT).partition(mark)[0] for key in state if mark in key))
    return replace_options(config, target_modules=paths) if paths else config
