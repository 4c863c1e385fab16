"""An adapter: a name, a configuration, and one method at each of its places."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import PeftConfig, TargetedConfig, WeightConfig
from . import roles, target, tied, tying
from .backbone import Backbone, backbones, stacks
from .layer import Layer
from .method import AttentionMethod, Companion, Driven, InputMethod, Method, ModuleMethod, WeightMethod, method_for
from .precision import linear
from .roles import Place
from .store import float_form, quantised, take_form, value
from .stream import StreamMethod


class ModuleCopy(ModuleMethod):
    """A full, trained copy of a module, called in its place: `modules_to_save`."""

    config_class = PeftConfig

    def __init__(self, config: PeftConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.copy = _plain_copy(layer.module).requires_grad_(True)
        self.widens = type(self.copy).forward is not nn.Linear.forward
        self.ties, self.tied = tying.same(config), False

    @classmethod
    def places(cls, config: PeftConfig, base: nn.Module) -> list[Place]:
        found = target.by_name(base, config.modules_to_save or (), f"{type(config).__name__}: modules_to_save")
        return [Place(path, module) for path, module in found]

    def share(self, earlier: Method) -> None:
        if self.ties and isinstance(earlier, ModuleCopy):
            self.tied, self.copy.weight = True, earlier.copy.weight

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        copied: Any = self.copy
        return copied(x) if self.widens else linear(copied, x)


def _plain_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` with its values, as floats, and without the hooks by which accelerate moves them."""
    copied = copy.deepcopy(module)
    for one, other in zip(module.modules(), copied.modules(), strict=True):  # values that accelerate keeps elsewhere
        for name in [n for n, p in one.named_parameters(recurse=False) if p.is_meta]:
            other.register_parameter(name, nn.Parameter(value(one, name)))
    for _, inside, store in list(quantised(copied)):
        take_form(inside, float_form(inside, store.read(inside), getattr(inside, "bias", None)))
    if any(hasattr(m, "_hf_hook") for m in copied.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(copied, recurse=True)
    return copied


@dataclass(frozen=True)
class Part:
    """One method of an adapter, at one place."""

    place: Place
    method: Method
    key: str
    """Attribute path of the method below the adapter."""

    @property
    def kind(self) -> str:
        """What the method stands around: "module", "span", "parameter", "attention", "input" or "stream"."""
        if self.place.parameter:
            return "parameter"
        match self.method:
            case AttentionMethod():
                return "attention"
            case InputMethod():
                return "input"
            case StreamMethod():
                return "stream"
            case _:
                return "span" if self.place.reads else "module"


class Adapter(nn.Module):
    """A named set of trained weights. Its parameters lie under `sites`, by what they adapt, and the method."""

    def __init__(self, name: str, config: PeftConfig) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.sites = nn.Module()
        self.shared: nn.Module | None = None
        self.learning_rate: float | None = None
        """What it was last trained with, where `param_groups` was told."""
        self.parts: list[Part] = []
        self.stacks: Sequence[Backbone] = ()
        """Of the base, if this puts virtual tokens in front of one (all, since a decoder sees those of its encoder), or
        looks at its tokens."""
        self.noted: Sequence[nn.Module] = ()
        """The stacks of the base, if this asks which tokens are real."""
        self.two_stacks = False
        """Whether the base is an encoder-decoder."""
        self.steps: Tensor | None
        self.register_buffer("steps", None)
        """() how many optimiser steps have trained it, if one of its methods acts on them."""
        self.facts: dict[str, Any] = {}
        """What the base told about itself for fields that the configuration left out."""

    def add(self, place: Place, method: Method) -> None:
        site = f"{place.path.replace('.', '/')}/{type(method).__name__.lower()}"
        self.sites.add_module(site, method)
        self.parts.append(Part(place, method, f"sites.{site}"))

    @functools.cached_property
    def by_kind(self) -> Mapping[str, Mapping[nn.Module, Sequence[Part]]]:
        """Its parts by the kind of call that they stand around, and by module. To be asked when it has all of them."""
        found: dict[str, dict[nn.Module, list[Part]]] = {}
        for part in self.parts:
            found.setdefault(part.kind, {}).setdefault(part.place.module, []).append(part)
        return found

    @functools.cached_property
    def tasks(self) -> int:
        """How many tasks it tells apart, by the call's `task_ids`; 0: none."""
        return max((part.method.tasks for part in self.parts), default=0)

    @property
    def weight(self) -> Tensor:
        """All its parameters as one vector, with their gradients' graph."""
        return torch.cat([p.reshape(-1) for p in self.parameters()])

    @property
    def attribute(self) -> str:
        """What the view calls it."""
        return attribute(self.name)

    def extra_repr(self) -> str:
        return f"{self.name!r}, {type(self.config).__name__}, {len(self.parts)} sites"


_BARE = nn.Module()


def attribute(name: str) -> str:
    """`name` as an attribute of a bare module: no dot, no name that modules use for themselves."""
    safe = name.replace("%", "%25").replace(".", "%2E") or "/"
    return f"%{safe}" if hasattr(_BARE, safe) else safe


def build(name: str, config: PeftConfig, base: nn.Module, half: bool = False, blank: bool = False) -> Adapter:
    """A new adapter with its parameters, on the devices of the modules it adapts; `base` is not changed.

    Args:
        half: keep bf16 and fp16 for the adapter's parameters where the base has them; fp32 otherwise.
        blank: zero in place of what is random at the start, for an adapter that gets its values from elsewhere.

    Raises:
        ValueError: the configuration does not fit the model.
    """
    cls = method_for(config)
    config = with_head(config, base)
    config = replace_options(config, modules_to_save=tying.with_copies(config, base))
    adapter = Adapter(name, config)
    adapter.two_stacks = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
    places = cls.places(config, base)
    adapter.facts = cls.facts(config, base)
    with _seeded(config.init_seed), _Blank() if blank else nullcontext():
        adapter.shared = cls.shared(config, base, places)
        own = Companion(cls, config, places)
        for one in sorted([own, *cls.companions(config, base, places)], key=lambda one: not one.below):
            shared = adapter.shared if one is own else None
            for place in one.places:
                adapter.add(place, _made(one.method, one.config, place, base, shared, blank))
    for place in ModuleCopy.places(config, base):
        adapter.add(place, _made(ModuleCopy, config, place, base))
    if adapter.shared is not None:
        _settled(adapter.shared, places[0].module, half)
    for part in adapter.parts:
        _settled(part.method, part.place.module, half)
    methods = [p.method for p in adapter.parts]
    if any(
        isinstance(m, InputMethod | StreamMethod) or m.invoked_by or getattr(m, "position_offset", 0) for m in methods
    ):
        adapter.stacks = backbones(base)
    if any(part.method.reads_tokens for part in adapter.parts):
        adapter.noted = [stack.module for stack in stacks(base)]
    if any(isinstance(part.method, Driven) for part in adapter.parts):
        adapter.steps = torch.zeros((), dtype=torch.long)
    _share(adapter, base)
    adapter.requires_grad_(not config.inference_mode)
    return adapter


def _share(adapter: Adapter, base: nn.Module) -> None:
    """Tells methods at tied weights of one another, and those that have one set of parameters for all places."""
    seen: dict[tuple[int, type[Method]], Method] = {}
    weights = tied.weights(base, [part.place.module for part in adapter.parts])
    for part in adapter.parts:
        weight = adapter if part.method.one_for_all else weights[part.place.module]
        if weight is not None:
            earlier = seen.setdefault((id(weight), type(part.method)), part.method)
            if earlier is not part.method:
                part.method.share(earlier)


def with_head(config: PeftConfig, base: nn.Module) -> PeftConfig:
    """For classification, the newly made head is trained along, as in the field."""
    return train_head(config, base) if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else config


def train_head(config: PeftConfig, base: nn.Module) -> PeftConfig:
    """Has the head trained along, unless the configuration says itself what is, or adapts the head."""
    if config.modules_to_save is not None:
        return config
    heads = [name for name in roles.HEADS if hasattr(base, name)]
    targeted = isinstance(config, TargetedConfig) and isinstance(config.target_modules, Sequence)
    heads = [h for h in heads if not targeted or h not in (config.target_modules or ())]  # type: ignore[attr-defined]
    return replace_options(config, modules_to_save=heads) if heads else config


def replace_options(config: PeftConfig, **changes: Any) -> PeftConfig:
    """A configuration with some fields changed."""
    return dataclasses.replace(config, **changes)


def make(cls: type[Method], config: PeftConfig, place: Place, base: nn.Module, half: bool) -> Method:
    """One method at one place, on the place's device and, unless that is half precision, in its dtype."""
    return _settled(_made(cls, config, place, base), place.module, half)


def _made(
    cls: type[Method],
    config: PeftConfig,
    place: Place,
    base: nn.Module,
    shared: nn.Module | None = None,
    blank: bool = False,
) -> Method:
    made: Callable[..., Method] = cls
    if place.parameter:
        _check_parameter(cls, config, place)
    layer = place.layer
    layer.role, layer.blank = place.role, blank
    if place.reads is not None:
        return made(config, layer, shared, Layer(place.reads[1], place.reads[0]))
    if issubclass(cls, WeightMethod | ModuleMethod):
        method = made(config, layer, shared)
        if place.parameter and (why := getattr(method, "needs_call", "")):
            raise ValueError(_at_parameter(cls, place, why))
        return method
    return made(config, place, base, shared)


def _check_parameter(cls: type[Method], config: PeftConfig, place: Place) -> None:
    """Refuses what has no effect on a parameter, or not all of it."""
    if isinstance(config, WeightConfig):
        config.without_input(repr(place.site))
    if not issubclass(cls, WeightMethod):
        raise ValueError(_at_parameter(cls, place, "it is no map of weights"))


def _at_parameter(cls: type[Method], place: Place, why: str) -> str:
    return (
        f"{cls.__name__} cannot adapt {place.site!r}, a parameter that the model multiplies itself: {why}. Target "
        "layers with it; LoRA, OFT and other maps of weights adapt parameters."
    )


M = TypeVar("M", bound=nn.Module)


def _settled(made: M, beside: nn.Module, half: bool) -> M:
    """`made` on the device where `beside` computes, which is not where its weights wait if accelerate offloads them."""
    like = Layer(beside).like()
    wide = like.dtype in (torch.float32, torch.float64) or half
    hooks = [getattr(module, "_hf_hook", None) for module in beside.modules()] if like.is_meta else []
    computes = [found for hook in hooks if (found := getattr(hook, "execution_device", None)) is not None]
    device, dtype = computes[0] if computes else like.device, like.dtype if wide else torch.float32
    tensors = (*made.parameters(), *made.buffers())
    if any(t.device != device or (t.is_floating_point() and t.dtype != dtype) for t in tensors):
        made.to(device=device, dtype=dtype)
        tensors = (*made.parameters(), *made.buffers())
    for tensor in tensors:
        if not tensor.is_contiguous():  # as decompositions leave it; safetensors writes nothing else
            tensor.data = tensor.data.contiguous()
    return made


def _seeded(seed: int | None) -> AbstractContextManager[Any]:
    if seed is None:
        return nullcontext()
    return _Seeded(seed)


class _Seeded:
    """Context: the global generator starts from `seed`, and goes on afterwards as if nothing had been drawn."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.before)


class _Blank(TorchFunctionMode):
    """Context: what would be filled with random numbers is zero, which costs next to nothing.

    But for what a generator of its own fills: those numbers are no start, they are always the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        match func.__name__:
            case "randn" if kwargs.get("generator") is None:
                return torch.zeros(*args, **kwargs)
            case "uniform_" | "normal_" | "kaiming_uniform_" if kwargs.get("generator") is None:
                filled: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
                with torch.no_grad():
                    return filled.zero_()
            case _:
                return func(*args, **kwargs)


def sites_of(adapter: Adapter) -> list[nn.Module]:
    """Every module that an adapter needs as a site."""
    found = [p.place.module for p in adapter.parts]
    found += [p.place.reads[1] for p in adapter.parts if p.place.reads]
    found += [module for stack in adapter.stacks for module in (stack.module, stack.embedding)]
    found += adapter.noted
    return list(dict.fromkeys(found))


def start_from(adapter: Adapter, source: Adapter) -> None:
    """Copies `source`'s weights. Raises ValueError where names or shapes differ."""
    own, other = adapter.state_dict(), source.state_dict()
    wrong = [k for k in own.keys() | other.keys() if k not in own or k not in other or own[k].shape != other[k].shape]
    if wrong:
        raise ValueError(
            f"init_from={source.name!r}: its parameters are not of the same names and shapes; {len(wrong)} differ, "
            f"{sorted(wrong)[0]!r} among them."
        )
    adapter.load_state_dict(other)
