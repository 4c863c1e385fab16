from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TargetedConfig
from ..core import roles, target
from ..core.activation import activations
from ..core.layer import Layer, kind_of
from ..core.method import Companion, ModuleMethod, register
from ..core.mixture import mixtures
from ..core.precision import linear, scaled, wide
from ..core.roles import Place
from .invertible import Invertible, InvertibleConfig


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(TargetedConfig):
    """Two dense layers and a residual inside of each Transformer layer."""

    kind = "BOTTLENECK"

    placement: str = "pfeiffer"
    """"houlsby": after attention and after the feed-forward part. "pfeiffer": after the feed-forward part only.
    "parallel": beside the feed-forward part, reading its input."""
    reads: str = "part"
    """"part": what the part gives, or, in the parallel form, is given. "stream": what the block adds that up to, behind
    a norm that follows (BERT), or, in the parallel form, before the norm in front: as in AdapterHub's files."""
    bottleneck_size: int | None = None
    """Width between the two layers."""
    reduction_factor: float | None = None
    """The same as hidden size / width; 16 if neither is given."""
    non_linearity: str = "relu"
    """Between the two layers; any activation that transformers knows by name."""
    scaling: float | str = 1.0
    """What the output is multiplied by: a number (4 in He et al.), or "learned", or "channel": learned ones, one for
    each feature."""
    init_weights: str = "zero"
    """"zero": U starts at zero, so that nothing changes; "houlsby": D and U small, normal with a spread of 0.01."""
    stochastic_depth: float = 0.0
    """Share of a batch's rows that do without the adapter while training."""
    adapter_layer_norm: str | None = None
    """A trained LayerNorm "before" the first layer, or "after" the second."""
    adapter_dropout: float = 0.0
    """Share of the adapter's outputs that are dropped while training."""
    inv_adapter: str | None = None
    """"nice": an invertible adapter at the embeddings beside it (InvertibleConfig): MAD-X's language adapter."""
    inv_adapter_reduction_factor: float | None = None
    """The `reduction_factor` of that; 2 if left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("bottleneck_size")
        self.choice("placement", ("houlsby", "pfeiffer", "parallel"))
        self.choice("reads", ("part", "stream"))
        if self.reads == "stream" and (self.placement == "houlsby" or self.target_modules is not None):
            raise ValueError(
                f"{type(self).__name__}: reads='stream' is for the usual places of 'pfeiffer' and 'parallel'."
            )
        self.choice("adapter_layer_norm", (None, "before", "after"))
        self.choice("non_linearity", tuple(activations()))
        self.choice("inv_adapter", (None, "nice"))
        self.choice("init_weights", ("zero", "houlsby"))
        self.probability("adapter_dropout", "stochastic_depth")
        self.no_effect("inv_adapter_reduction_factor", self.inv_adapter is None, "without inv_adapter='nice'")
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError("BottleneckConfig: give bottleneck_size or reduction_factor, not both.")
        self.above_zero("reduction_factor")
        if isinstance(self.scaling, str):
            self.choice("scaling", ("learned", "channel"))


@dataclass(frozen=True, kw_only=True)
class AdapterPlusConfig(BottleneckConfig):
    """Adapter+: a bottleneck behind the feed-forward part, each of whose features has a scale of its own."""

    non_linearity: str = "gelu"
    scaling: float | str = "channel"
    init_weights: str = "houlsby"
    stochastic_depth: float = 0.1


@register(BottleneckConfig)
class Bottleneck(ModuleMethod):
    """y + s U act(D y), y = base(x); in the parallel form y + s U act(D x)

    Parameter-Efficient Transfer Learning for NLP, Houlsby et al. 2019, arXiv:1902.00751; after the feed-forward part
    only: AdapterFusion, Pfeiffer et al. 2020, arXiv:2005.00247; parallel and scaled: Towards a Unified View of
    Parameter-Efficient Transfer Learning, He et al. 2021, arXiv:2110.04366; with an invertible adapter: MAD-X, Pfeiffer
    et al. 2020, arXiv:2005.00052. Serial ones sit right at the projection that ends the part, before the block's
    residual. U starts at zero. With a scale for each feature and small random starts (AdapterPlusConfig): Adapters
    Strike Back, Steitz & Roth 2024, arXiv:2406.06820. Use it for many tasks on one encoder, and beside a language
    adapter; it costs time in every call, since it cannot be merged. Parameters per site: 2 D m + D + m.
    """

    widens = False
    reduction: ClassVar[float] = 16

    def __init__(
        self,
        config: BottleneckConfig,
        layer: Layer,
        shared: nn.Module | None = None,
        reads: Layer | None = None,
    ) -> None:
        super().__init__(config, layer, shared)
        self.parallel = config.placement == "parallel"
        self.inside = config.reads == "stream" and _is_norm(layer) and not self.parallel
        mixed = next((m.width for m in mixtures(layer.module) if not m.path), None)
        out = _width(mixed or layer.width, layer)
        inner = _width(mixed or (reads or layer).input_width, reads or layer) if self.parallel else out
        size = config.bottleneck_size or max(1, round(out / (config.reduction_factor or self.reduction)))
        self.down, self.up = self.dense(config, shared, (inner, size, out))
        self.act = activations()[config.non_linearity]
        self.before = nn.LayerNorm(inner) if config.adapter_layer_norm == "before" else None
        self.after = nn.LayerNorm(out) if config.adapter_layer_norm == "after" else None
        self.dropout, self.skipped = config.adapter_dropout, config.stochastic_depth
        shape = (out,) if config.scaling == "channel" else ()
        self.scale: Any = nn.Parameter(torch.ones(shape)) if isinstance(config.scaling, str) else config.scaling

    def dense(self, config: Any, shared: nn.Module | None, sizes: tuple[int, int, int]) -> tuple[Any, Any]:
        """D and U, as they start."""
        inner, size, out = sizes
        down, up = nn.Linear(inner, size), nn.Linear(size, out)
        if config.init_weights == "houlsby":
            for layer in (down, up):
                nn.init.normal_(layer.weight, std=0.01).data.clamp_(-0.02, 0.02)
                nn.init.zeros_(layer.bias)
        else:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        return down, up

    @classmethod
    def places(cls, config: BottleneckConfig, base: nn.Module) -> list[Place]:
        if config.target_modules is not None:
            return [Place(path, module) for path, module in target.modules(config, base, ())]
        blocks = roles.blocks(base)
        if without := [block.path for block in blocks if block.feed_forward is None]:
            raise ValueError(
                f"BottleneckConfig: the feed-forward part of {without[0]!r} is not one; name target_modules."
            )
        ends = [block.feed_forward for block in blocks if block.feed_forward]
        paths = [last[0] for _, last in ends]
        if config.placement == "houlsby":
            paths = [p for block, (_, last) in zip(blocks, ends, strict=True) for p, _ in (*block.attention, last)]
        if config.reads == "stream":
            return _at_streams(config, base, blocks)
        apart = [(first, last) for first, last in ends if first != last]
        reads = {last[0]: first for first, last in apart} if config.placement == "parallel" else {}
        return [Place(path, module, reads.get(path)) for path, module in target.modules(config, base, paths)]

    @classmethod
    def companions(cls, config: BottleneckConfig, base: nn.Module, places: list[Place]) -> list[Companion]:
        if config.inv_adapter is None:
            return []
        own = InvertibleConfig(
            reduction_factor=2.0 if (given := config.inv_adapter_reduction_factor) is None else given,
            non_linearity=config.non_linearity,
            modules_to_save=config.modules_to_save,
        )
        return [Companion(Invertible, own, Invertible.places(own, base))]

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        h = x if self.parallel else y
        h = h if self.before is None else wide(self.before, h)
        change = linear(self.up, self.act(linear(self.down, h)))
        change = change if self.after is None else wide(self.after, change)
        if self.training and self.dropout:
            change = F.dropout(change, self.dropout)
        if self.training and self.skipped:
            kept = torch.empty(len(y), *[1] * (y.dim() - 1), device=y.device).bernoulli_(1 - self.skipped)
            change = change * (kept / (1 - self.skipped)).to(change.dtype)
        if self.inside:
            return base(x + scaled(change, torch.as_tensor(self.scale, dtype=x.dtype, device=x.device)))
        if isinstance(self.scale, Tensor):
            return y + scaled(change, self.scale)
        return torch.add(y, change, alpha=self.scale)


def _at_streams(config: BottleneckConfig, base: nn.Module, blocks: list[roles.Block]) -> list[Place]:
    """Around the norm behind the feed-forward part, or around the block where that ends in the sum."""
    found: dict[str, Place] = {}
    for block in blocks:
        assert block.feed_forward is not None
        path, module = block.feed_forward[1]
        before, behind = roles.norms_around(base, block)
        if config.placement == "parallel":
            place = Place(path, module, before or block.feed_forward[0])
        else:
            place = Place(*behind) if behind else Place(block.path, base.get_submodule(block.path))
        found[place.path] = place
    return [found[path] for path, _ in target.modules(config, base, list(found))]


def _is_norm(layer: Layer) -> bool:
    return (kind := kind_of(layer.module)) is not None and kind.name == "norm"


def _width(width: int | None, layer: Layer) -> int:
    if (kind := kind_of(layer.module)) is not None and kind.channel != -1:
        raise ValueError(
            f"BottleneckConfig: {layer.path!r} is a {type(layer.module).__name__}, whose features do not stand last in "
            "its output, (batch, features, ...). Target linear layers, or modules that give (..., features)."
        )
    if width is None:
        raise ValueError(
            f"BottleneckConfig: the width of {layer.path!r} ({type(layer.module).__name__}) cannot be found; "
            "target a linear layer."
        )
    return width
