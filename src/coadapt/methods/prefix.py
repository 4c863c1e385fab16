from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..config import AttentionConfig
from ..core import attention
from ..core.backbone import stack_facts, takes_positions
from ..core.method import AttentionMethod, Place, Reparametrization, register
from ..core.roles import Attention


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(AttentionConfig):
    """Trained keys and values in front of every attention's own."""

    kind = "PREFIX_TUNING"

    prefix_projection: bool = False
    """Train the prefix through an MLP, tanh between two linear layers, as the paper does."""
    encoder_hidden_size: int | None = None
    """Width inside of that MLP (the model's hidden size, if left out). Without the MLP, a check: that size."""
    prefix_type: str = "joint"
    """"joint": one softmax over prefix and input, as published. "decoupled": g softmax(q P_k) P_v is added, g zero at
    the start."""
    prefix_layout: str = "own"
    """"peft" for an encoder-decoder: as the field's library reads it, in the decoder's self-attention only, half of the
    blocks unused and the others used twice. Kept when such a folder is loaded."""
    init_weights: str | None = None
    """Left out, the prefix starts normal with a spread of 0.02; "zero": all of it at 0, which changes the model all the
    same, since tokens of nothing take their share of attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("encoder_hidden_size")
        self.choice("prefix_type", ("joint", "decoupled"))
        self.choice("init_weights", (None, "zero"))
        if self.init_weights == "zero" and self.prefix_type == "decoupled":
            raise ValueError(
                "PrefixTuningConfig: init_weights='zero' would never train in a decoupled prefix, whose gate is 0 then."
            )
        self.choice("prefix_layout", ("own", "peft"))
        if self.prefix_layout == "peft" and (
            self.prefix_sites or self.prefix_projection or self.prefix_type != "joint"
        ):
            raise ValueError(
                "PrefixTuningConfig: prefix_layout='peft' is the field's own form; it takes no prefix_sites, "
                "prefix_projection or prefix_type."
            )
        if self.prefix_type == "decoupled" and self.position_offset:
            raise ValueError(
                "PrefixTuningConfig: position_offset has no meaning for a decoupled prefix, which is added beside "
                "the input."
            )

    def for_inference(self) -> Self:
        return replace(self, prefix_projection=False, encoder_hidden_size=None) if self.prefix_projection else self


def _start(zero: bool, *shape: int) -> Tensor:
    return torch.zeros(shape) if zero else 0.02 * torch.randn(shape)


class Projection(Reparametrization):
    """P = W_2 tanh(W_1 E): one embedding and W_1 for all sites, a W_2 for each (the paper's section 4.3).

    The rows of one large W_2, kept apart: the gradient of a slice is as large as all of it, and there is one for each.
    """

    def __init__(self, tokens: int, width: int, hidden: int, outputs: Sequence[int], zero: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, width))  # (N, D)
        self.first = nn.Linear(width, hidden)
        self.second = nn.ModuleList(nn.Linear(hidden, size) for size in outputs)
        if zero:
            for parameter in self.second.parameters():
                nn.init.zeros_(parameter)

    def forward(self, number: int) -> Tensor:
        """(N, 2 H D) of one site."""
        return self.second[number](torch.tanh(self.first(self.embedding)))


class Blocks(nn.Module):
    """The field's layout for encoder-decoders: a block per layer; decoder layer i uses number 2i modulo layers."""

    def __init__(self, tokens: int, outputs: Sequence[int], zero: bool) -> None:
        super().__init__()
        self.outputs = list(outputs)
        self.P = nn.Parameter(_start(zero, tokens, sum(outputs)))  # (N, layers 2 H D)

    def forward(self, number: int) -> Tensor:
        """(N, 2 H D) of one block."""
        return self.P.split(self.outputs, dim=1)[number]


@dataclass(frozen=True, kw_only=True)
class Joined(Attention):
    """An attention call that a prefix joins, and what is found for all calls together."""

    offset: int
    """By how much real tokens are shifted."""
    number: int
    """Which part of what is shared is its own."""
    bias_of: tuple[Any, ...]
    """The module that makes relative positions, where virtual tokens have some."""


@register(PrefixTuningConfig)
class PrefixTuning(AttentionMethod):
    """base(q, [P_k; k], [P_v; v])

    Prefix-Tuning: Optimizing Continuous Prompts for Generation, Li & Liang 2021, arXiv:2101.00190. For encoder-decoders
    in encoder, decoder and cross-attention, as there. The decoupled form is LLaMA-Adapter's, arXiv:2303.16199. Use it
    where generation is steered and weights must stay as they are; it needs a higher rate than the rest. Parameters per
    site: 2 N H D.
    """

    def __init__(
        self,
        config: PrefixTuningConfig,
        place: Joined,
        base: Any,
        shared: Projection | Blocks | None = None,
    ) -> None:
        super().__init__()
        n = config.num_virtual_tokens
        self.shape = (n, 2, place.heads, place.head_dim)
        self.joint = config.prefix_type == "joint"
        self.position_offset, self.bias_of = place.offset, place.bias_of
        self.projection = (shared, place.number) if shared is not None else None
        if shared is None:
            self.P = nn.Parameter(_start(config.init_weights == "zero", *self.shape))  # (N, 2, H, D): keys, then values
        if not self.joint:
            self.gate = nn.Parameter(torch.zeros(()))

    @classmethod
    def places(cls, config: PrefixTuningConfig, base: nn.Module) -> list[Place]:
        found, offset = places_of(config, base), _offset(config, base)
        step = 2 if config.prefix_layout == "peft" else 1
        first: Any = found[0].module
        bias_of = (first,) if config.prefix_layout == "peft" and hasattr(first, "compute_bias") else ()
        numbers = [step * i % len(found) for i in range(len(found))]
        return [
            Joined(**vars(p), offset=offset, number=number, bias_of=bias_of)
            for p, number in zip(found, numbers, strict=True)
        ]

    @classmethod
    def shared(cls, config: PrefixTuningConfig, base: Any, places: list[Any]) -> nn.Module | None:
        outputs, zero = [2 * p.heads * p.head_dim for p in places], config.init_weights == "zero"
        if _is_field_layout(config, base):
            return Blocks(config.num_virtual_tokens, outputs, zero)
        if not config.prefix_projection:
            return None
        width = base.config.get_text_config().hidden_size
        return Projection(config.num_virtual_tokens, width, config.encoder_hidden_size or width, outputs, zero)

    @classmethod
    def facts(cls, config: PrefixTuningConfig, base: Any) -> dict[str, Any]:
        one = places_of(config, base)[0]
        inner = config.encoder_hidden_size or base.config.get_text_config().hidden_size
        sizes = {
            "token_dim": one.heads * one.head_dim,
            "num_attention_heads": one.heads,
            "encoder_hidden_size": inner,
        }
        return {**stack_facts(base), **sizes}

    def prefix(self) -> tuple[Tensor, Tensor]:
        if self.projection is None:
            both = self.P
        else:
            shared, number = self.projection
            both = shared(number).view(self.shape)
        keys, values = both.permute(1, 2, 0, 3)  # each (H, N, D)
        return keys, values

    def start_at(self, both: Tensor) -> None:
        """Has the prefix stand at these keys and values, (N, 2, H, D)."""
        if self.projection is not None:
            raise ValueError("A network makes this prefix; it cannot start at given keys and values.")
        self.P.copy_(both)

    def position_bias(self, queries: int, keys: int) -> Tensor | None:
        if not self.bias_of:
            return None
        n = self.shape[0]
        return self.bias_of[0].compute_bias(queries, n + keys, past_seen_tokens=n + keys - queries)[..., :n]

    def strength(self) -> Tensor | None:
        return None if self.joint else self.gate


def places_of(config: PrefixTuningConfig, base: Any) -> list[Attention]:
    """The attention calls that this prefix joins."""
    found = attention.joinable(type(config).__name__, base)
    facts = base.config.get_text_config()
    two = bool(getattr(facts, "is_encoder_decoder", False))
    config.restates(num_transformer_submodules=2 if two else 1, num_layers=facts.num_hidden_layers)
    sizes = {
        "token_dim": (found[0].heads * found[0].head_dim, facts.hidden_size),
        "num_attention_heads": (found[0].heads, facts.num_attention_heads),
    }
    for name, allowed in sizes.items():
        if getattr(config, name) not in allowed:
            config.restates(**{name: allowed[0]})
    if not config.prefix_projection:
        config.restates(encoder_hidden_size=facts.hidden_size)
    if _is_field_layout(config, base):
        return [p for p in found if p.role == "decoder"]
    roles = list(dict.fromkeys(p.role for p in found))
    if wrong := [role for role in config.prefix_sites or () if role not in roles]:
        raise ValueError(f"{type(config).__name__}: prefix_sites {wrong} are not in this model; it has {roles}.")
    return [p for p in found if p.role in (config.prefix_sites or roles)]


def _is_field_layout(config: PrefixTuningConfig, base: Any) -> bool:
    """On a model that is one stack, both layouts are the same."""
    return config.prefix_layout == "peft" and bool(getattr(base.config, "is_encoder_decoder", False))


def _offset(config: PrefixTuningConfig, base: Any) -> int:
    counts = takes_positions(base)
    if config.position_offset and not counts:
        raise ValueError(
            f"{type(config).__name__}: position_offset has no effect on {type(base).__name__}, which takes no "
            "position_ids."
        )
    if config.position_offset is not None:
        return config.position_offset
    return config.num_virtual_tokens if counts and config.prefix_type == "joint" else 0
