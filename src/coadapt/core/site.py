"""Making a module a site, in place: it keeps its name, its parameters and its keys; only its class is a subclass."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from .frame import Carried, current, refuse_lost_frame

ENTRANCE = "_coadapt_entrance"
"""Attribute of modules that are called as the base's own: what makes a call of such a module one of a view."""


class Site:
    """Mixed into the class of every site; tells them apart."""


@functools.cache
def site_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose forward goes through what the current frame has for it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame = current()
        if frame is None:
            refuse_lost_frame()
            entrance = self.__dict__.get(ENTRANCE)
            if entrance is None:
                return cls.forward(self, *args, **kwargs)
            with entrance.running(None, None, args, kwargs):
                return forward(self, *args, **kwargs)
        call = frame.calls.get(self)
        if call is None:
            return cls.forward(self, *args, **kwargs)
        return call(frame, functools.partial(cls.forward, self), args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """A copied or pickled module is a plain one: what it is a site of is not copied along."""
        if ENTRANCE in self.__dict__:
            return self.__dict__[ENTRANCE].reduced(self)
        return new, (vars(cls).get("_coadapt_below", cls),), dict(self.__dict__)

    setattr(forward, "__wrapped__", cls.forward)  # noqa: B010   signatures are read through it
    body: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce, "__module__": cls.__module__}
    body |= {"_gradient_checkpointing_func": property(_checkpoint_of, _set_checkpoint)}
    if hasattr(cls, "forward") and "ALL_ATTENTION_FUNCTIONS" in _names_in(cls):
        body |= {"config": property(_config_of, _set_config), "_coadapt_has_interface": True}
    made = types.new_class(cls.__name__, (Site, cls), exec_body=lambda namespace: namespace.update(body))
    made.__qualname__ = cls.__qualname__  # accelerate's and FSDP's policies go by name
    return made


def _names_in(cls: type[nn.Module]) -> tuple[str, ...]:
    function: Any = cls.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(getattr(function, "__code__", None), "co_names", ())


def _config_of(self: Any) -> Any:
    """The model's configuration; inside of a call that joins a prefix here, a copy that names our attention."""
    frame = current()
    call = None if frame is None else frame.attention.get(self)
    return self.__dict__["config"] if call is None else call.config


def _set_config(self: Any, config: Any) -> None:
    self.__dict__["config"] = config


def _checkpoint_of(self: Any) -> Any:
    """The checkpointing function that transformers has set, taking the frame along into the recomputation."""
    if "_gradient_checkpointing_func" not in self.__dict__:
        raise AttributeError("_gradient_checkpointing_func")
    return Carried(self.__dict__["_gradient_checkpointing_func"])


def _set_checkpoint(self: Any, function: Any) -> None:
    self.__dict__["_gradient_checkpointing_func"] = function


def new(cls: type[nn.Module]) -> nn.Module:
    """A bare module of a class, which pickle fills."""
    return cls.__new__(cls)


def make(module: nn.Module) -> None:
    """Makes `module` a site. Does nothing to one that is a site already."""
    if not isinstance(module, Site):
        _set_class(module, site_class(type(module)))


def unmake(module: nn.Module) -> None:
    """Makes a site the plain module again, wherever in its class the site stands by now.

    Raises:
        TypeError: its class was changed since in a way that cannot be rebuilt without the site.
    """
    _set_class(module, plain_class(type(module)))


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives `module` another class below its site, if it is one."""
    _set_class(module, site_class(cls) if isinstance(module, Site) else cls)


def plain_class(cls: type[Any]) -> type[Any]:
    if Site in cls.__bases__:
        return cls.__bases__[1]
    if not issubclass(cls, Site):
        return cls
    bases = tuple(plain_class(base) for base in cls.__bases__)
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__", "__doc__")}
    try:
        return types.new_class(cls.__name__, bases, exec_body=lambda namespace: namespace.update(body))
    except TypeError as error:
        raise TypeError(
            f"The adapters cannot be taken off a {cls.__name__}: its class was changed since ({error})."
        ) from error


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Also hands the new class's forward to whoever kept a bound one (accelerate's hooks do)."""
    old = {getattr(c, "forward", None) for c in type(module).__mro__}
    module.__class__ = cls
    for name in ("forward", "_old_forward"):
        kept = module.__dict__.get(name)
        if isinstance(kept, types.MethodType) and kept.__func__ in old:
            module.__dict__[name] = types.MethodType(cls.forward, module)


def first_input(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """A module's first input, and its forward as a function of that alone, the others as they were."""
    if args:
        return args[0], lambda x: forward(x, *args[1:], **kwargs)
    name = next(iter(kwargs))
    return kwargs[name], lambda x: forward(**{**kwargs, name: x})


def shadow(config: Any, attention: str) -> Any:
    """A copy of a model's configuration that names another attention function."""
    other = copy.copy(config)
    other.__dict__["_attn_implementation_internal"] = attention
    return other
