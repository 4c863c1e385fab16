"""What a method is: a small trainable module around one call of the frozen model.

Shape letters, used in every comment of core/ and methods/:
B rows of the batch, T tokens, S keys, I in-features, O out-features, K kernel dims, R rank, N virtual tokens,
D hidden size, H heads, C compositions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ..config import PeftConfig
from . import target
from .backbone import Backbone, backbones, stack_facts, without_tokens
from .layer import Layer
from .roles import Place

METHODS: dict[str, type["Method"]] = {}
"""Every method by the name that its configuration gives as `method`."""
M = TypeVar("M", bound=type["Method"])


@dataclass(frozen=True)
class Companion:
    """Another method that an adapter brings along, at places of its own (biases beside a LoRA)."""

    method: type["Method"]
    config: PeftConfig
    places: Sequence[Place]
    below: bool = False
    """Whether it changes the layer before the method itself does: the method reads what this leaves."""


def register(config: type[PeftConfig], variant: str | None = None) -> Callable[[M], M]:
    """Class decorator: the method that `config` configures; a `variant` of it where its `method` says that name."""

    def add(cls: M) -> M:
        name = variant or str(config.kind)
        if name in METHODS:
            raise ValueError(f"Method {name!r} is already registered by {METHODS[name].__module__}.")
        cls.config_class, cls.registered = config, name
        METHODS[name] = cls
        return cls

    return add


def method_for(config: Any) -> type["Method"]:
    """The class that makes what `config` describes."""
    if not isinstance(config, PeftConfig):
        raise TypeError(
            f"A configuration of coadapt is needed (LoraConfig, PromptTuningConfig ...); got a "
            f"{type(config).__module__}.{type(config).__name__}. Import it from coadapt instead."
        )
    if config.method not in METHODS:
        raise ValueError(f"{type(config).__name__} names no method; known: {', '.join(METHODS)}.")
    return METHODS[config.method]


class Method(nn.Module, ABC):
    """Around one call. `base` is that call: frozen, or already adapted by what stands below it."""

    config_class: ClassVar[type[PeftConfig]]
    registered: ClassVar[str] = ""
    """Its key in METHODS."""
    one_for_all: ClassVar[bool] = False
    """Whether all places of an adapter use the parameters of the first: then each later one is told by `share`."""
    reads_tokens: bool = False
    """Whether it asks which tokens of a row are real (pooling.order_in_row)."""
    reads_last: bool = False
    """Whether it asks for the last of them, which move when a text grows."""
    tasks: int = 0
    """How many tasks it tells apart, by the call's `task_ids`; 0: none."""
    widens: bool = True
    """Whether `forward` gets x in the dtype of the method's parameters (fp32 on a base in half precision), and the core
    casts back what it returns. False: it gets x as the model has it, and returns what `base(x)` has."""

    left_out: ClassVar[Sequence[str]] = ()
    """Last parts of names in its state that files leave out, since they are worked out again."""
    invoked_by: tuple[int, ...] = ()
    """Tokens from whose last occurrence in a row on it is active: see invocation.py. Empty: always."""

    @classmethod
    @abstractmethod
    def places(cls, config: Any, base: nn.Module) -> list[Place]:
        """Where an adapter of this configuration sits in `base`. Raises ValueError where that is nowhere."""

    @classmethod
    def shared(cls, config: Any, base: nn.Module, places: list[Place]) -> nn.Module | None:
        """What all sites of one adapter have in common; built once. Default: nothing."""
        return None

    @classmethod
    def facts(cls, config: Any, base: nn.Module) -> dict[str, Any]:
        """Fields that restate the model, as files give them. Default: none."""
        return {}

    def share(self, earlier: "Method") -> None:
        """Called where an earlier place of the same adapter holds the very same (tied) weight, or at all later places
        if `one_for_all`. Default: nothing."""

    @classmethod
    def companions(cls, config: Any, base: nn.Module, places: list[Place]) -> list[Companion]:
        """Other methods that belong to the same adapter. Default: none."""
        return []

    def refresh(self) -> None:
        """Called before each call of the model that it takes part in, where torch.compile does not look. Default:
        nothing."""


class Reparametrization(nn.Module):
    """What makes an adapter's parameters while it trains. Files for inference hold what it has made."""


class Progress(nn.Module):
    """What a method knows of its training, as buffers. Files for inference leave it out."""


class FromBase(nn.Module):
    """What is made from the base's weights, as buffers, and so can be made again. Files leave it out."""


class Driven:
    """Mixed into a method that acts between the steps of its training: see driving.py, which calls it."""

    @classmethod
    def before_step(cls, methods: Sequence[Any], step: int) -> None:
        """The methods of one adapter before its `step`-th step, the first is 1: gradients are whole, and not used yet.
        Default: nothing."""

    @classmethod
    def after_step(cls, methods: Sequence[Any], step: int) -> None:
        """The same after it. Default: nothing."""


class WeightMethod(Method):
    """A method on a layer that is a map W -> W'. `merge` defines it; `forward` may say the same thing faster.

    Merge law, tested for every registered method: forward(x, base) == base.apply(x, merge(W), merge_bias(b)).
    """

    kinds: ClassVar[Sequence[str]] = ("linear", "embedding", "conv")
    """The kinds of layer that it adapts; all others are refused. Fused experts ("experts", (E, O, I)) it need not know:
    it is made for each of them, as for a linear layer, and vmap goes through `merge`."""
    needs_call: str = ""
    """Why it has to stand around a call, where `merge` is not all of it: then it has no place at a parameter, which is
    multiplied by the model's own code."""

    def __init__(self, config: Any, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.kind = layer.kind.name
        self.check(layer)
        self._bank = (shared,)  # in a tuple: it is the adapter's, and no module of each site's as well

    @property
    def bank(self) -> Any:
        """What `shared` made."""
        return self._bank[0]

    @classmethod
    def check(cls, layer: Layer) -> None:
        """Refuses a layer of another kind."""
        if layer.kind.name not in cls.kinds:
            raise ValueError(
                f"{cls.__name__} adapts layers of these kinds: {', '.join(cls.kinds)}; {layer.path!r} is a "
                f"{type(layer.module).__name__} ({layer.kind.name}). Leave it out of target_modules."
            )

    @classmethod
    def places(cls, config: Any, base: nn.Module) -> list[Place]:
        found = target.places(config, base, cls.kinds)
        target.check_patterns(config, found, *config.patterns)
        if hasattr(config, "fan_in_fan_out"):
            target.check_transposed(config, [place.module for place in found])
        return found

    @abstractmethod
    def merge(self, weight: Tensor) -> Tensor:
        """(O, I, *K) -> (O, I, *K). Pure: does not write into `weight`."""

    def merge_bias(self, bias: Tensor | None) -> Tensor | None:
        """(O,) or None -> (O,) or None. Pure."""
        return bias

    def new_bias(self, below: Layer) -> Tensor | None:
        """b' of a layer, which is `merge_bias` of its bias unless the method lets it depend on the weight, too."""
        return self.merge_bias(below.bias)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        return base.apply(x, self.merge(base.weight()), self.new_bias(base))


class AdditiveMethod(WeightMethod):
    """W' = W + change, whatever W is: the layer runs as it is, and the change beside it, in the model's dtype."""

    widens = False

    @abstractmethod
    def change(self) -> Tensor:
        """(O, I, *K)"""

    def merge(self, weight: Tensor) -> Tensor:
        return weight + self.change()

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        return y + base.apply(x, self.change()).to(y.dtype)


class ModuleMethod(Method):
    """Around any module: x is its first input, (B, T, D) as a rule, `base(x)` its first output."""

    def __init__(self, config: Any, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, base: Layer) -> Tensor:
        """What the adapted module gives for x."""


class AttentionMethod(Method):
    """Keys and values joined to those of one attention call, after any rotary embedding and outside of the cache."""

    joint: bool = True
    """True: in the same softmax as the call's own. False: a second attention, added with the weight `strength()`."""
    behind: bool = False
    """Decoupled: whether what it gives is added behind the projection that ends the attention, which is as wide."""
    position_offset: int = 0
    """By how much the real tokens' positions are shifted while this is active."""

    @abstractmethod
    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (H, N, D) with the H and D of the call's own keys."""

    def position_bias(self, queries: int, keys: int) -> Tensor | None:
        """What relative positions add to the scores, (1, H, queries, N), for `keys` real keys; None for nothing."""
        return None

    def strength(self) -> Tensor | None:
        """The weight of a decoupled prefix, a scalar."""
        return None


_RESTATED = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
"""Fields of configurations of virtual tokens -> what transformers' call the same."""


class InputMethod(Method):
    """Virtual tokens in front of the embedded sequence. The core sees to masks, positions, packing and caches."""

    keeps_virtual_tokens: bool = False
    """True: the output holds the virtual tokens' states too."""
    labels: tuple[Tensor, Tensor] | None = None
    """Of the virtual tokens, if they are learned from: (N,) each, -100 for none, and what the loss of it counts."""

    def __init__(self, config: Any, place: Backbone, base: Any, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.keeps_virtual_tokens = config.output_virtual_tokens

    @classmethod
    def places(cls, config: Any, base: Any) -> list[Place]:
        found, other = backbones(base), without_tokens(base)
        there = [b.role for b in found]
        facts = base.config.get_text_config()
        told = {name: getattr(facts, field, None) for name, field in _RESTATED.items()}  # Mamba has no heads
        told |= {"token_dim": found[0].width, "num_transformer_submodules": len(found) + len(other)}
        config.restates(**{name: value for name, value in told.items() if value is not None})
        wanted = config.prompt_sites or there[:1]
        if wrong := [role for role in wanted if role not in there]:
            who = type(config).__name__
            why = "".join(f" Its {role} has no tokens: {maker} makes its input." for role, maker in other.items())
            raise ValueError(f"{who}: prompt_sites {wrong} are not in this model; it has {there}.{why}")
        return [b for b in found if b.role in wanted]

    @classmethod
    def facts(cls, config: Any, base: Any) -> dict[str, Any]:
        heads = getattr(base.config.get_text_config(), "num_attention_heads", None)
        return {**stack_facts(base), "token_dim": backbones(base)[0].width, "num_attention_heads": heads}

    @abstractmethod
    def prompt(self) -> Tensor:
        """(N, D); where the call's rows have other ones each, (B, N, D)."""
