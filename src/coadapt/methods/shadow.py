from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TargetedConfig
from ..core import roles, target
from ..core.backbone import backbones
from ..core.frame import current
from ..core.layer import Layer
from ..core.method import Place, register
from ..core.precision import linear
from ..core.stream import StreamMethod
from .shadow_stack import Mirror, width_of


@dataclass(frozen=True, kw_only=True)
class ShadowConfig(TargetedConfig):
    """A small network beside a causal language model, whose state goes along its blocks and is mixed into them."""

    kind = "SHADOW"

    r: int = 8
    """Rank of what the state adds to a block's input."""
    shadow_alpha: float = 0.1
    """Its scale."""
    shadow_dropout: float = 0.2
    """Share of the difference between hidden states and state that is dropped while training."""
    init_weights: bool = True
    """True: W_up starts at zero, so that nothing changes; False: random."""
    shadow_model: str = "mirror"
    """"mirror": a new network of the model's own architecture. Others are not read."""
    shadow_num_hidden_layers: int | None = None
    """Its layers; 1 if left out."""
    shadow_hidden_size: int | None = None
    """Its width; the model's if left out. With another one it has an embedding of its own, and a projection."""
    shadow_num_attention_heads: int | None = None
    """Its heads; the model's if left out."""
    shadow_intermediate_size: int | None = None
    """Width of its feed-forward parts; the model's if left out."""
    share_embeddings: bool = True
    """It reads what the model has embedded; otherwise it has an embedding of its own."""
    update_hidden_size: int | None = None
    """Width of the two networks that move the state at each block; r if left out."""
    auxiliary_loss_weight: float = 0.05
    """While training with labels: weight of the loss of the head on what the state begins as, added to the task's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        self.positive("r", "update_hidden_size", *(f"shadow_{size}" for size in sizes))
        self.probability("shadow_dropout")
        if self.shadow_model != "mirror":
            raise ValueError(
                f"ShadowConfig: shadow_model={self.shadow_model!r} is not read; only 'mirror' is, a new network of the "
                "model's own architecture."
            )
        if self.auxiliary_loss_weight < 0:
            raise ValueError(
                f"ShadowConfig: auxiliary_loss_weight={self.auxiliary_loss_weight} must not be below 0; 0 is no loss."
            )


@register(ShadowConfig)
class Shadow(StreamMethod):
    """y = base(x + alpha W_up W_down (x - s)), s' = (1 - g) s + g T(y), g = sigmoid(G(y)), at each block

    ShadowPEFT: Shadow Network for Parameter-Efficient Fine-Tuning, Li et al. 2026, arXiv:2604.19254. s begins as what a
    small stack of the model's architecture makes of the embedded input, and goes on to the next block as s'; T and G
    are two layers with a GELU between. In training with labels, the loss of the model's head on the first s is added
    with a weight. Different from peft: several at once, blocks that do not follow each other, no T and G at the last
    block, which nothing reads; the auxiliary loss whatever `task_type` is, and not in evaluation, whose loss stays the
    task's; no table of embeddings that nothing looks up (GPT-2). It depends on the input, so it cannot be merged. Use
    it where a layer or two more may run beside the model. Parameters per site:
    2 r D + 2 (2 D u + u + D), u the width of T and G; and the small stack.
    """

    def __init__(self, config: ShadowConfig, layer: Layer, shared: Mirror | None = None) -> None:
        super().__init__(config, layer, shared)
        assert shared is not None
        width = shared.width
        self.alpha, self.dropout, self._shared = config.shadow_alpha, config.shadow_dropout, (shared,)
        self.W_down = nn.Linear(width, config.r, bias=False)  # (R, D)
        self.W_up = nn.Linear(config.r, width, bias=False)  # (D, R)
        if config.init_weights:
            nn.init.zeros_(self.W_up.weight)
        inner = config.update_hidden_size or config.r
        self.moves = layer.role != "last"
        self.T, self.G = (_two_layers(width, inner) if self.moves else None for _ in range(2))
        shapes = {"0.weight": (inner, width), "0.bias": (inner,), "2.weight": (width, inner), "2.bias": (width,)}
        self.absent = {f"{m}.{n}": s for m in "TG" for n, s in shapes.items()} if not self.moves else {}
        """What files hold zeros for."""

    @property
    def source(self) -> Mirror:
        return self._shared[0]

    @classmethod
    def places(cls, config: ShadowConfig, base: Any) -> list[Place]:
        stacks = backbones(base)
        head = getattr(base, "get_output_embeddings", lambda: None)()
        if [stack.role for stack in stacks] != ["decoder"] or base.config.is_encoder_decoder or head is None:
            raise ValueError(
                f"ShadowConfig goes along the blocks of a causal language model, which {type(base).__name__} is not."
            )
        width = width_of(stacks[0].module.config)
        if stacks[0].width != width or Layer(head).shape[1] != width:
            raise ValueError(
                f"ShadowConfig: {type(base).__name__} embeds {stacks[0].width} features, and its hidden states have "
                f"{width}; they must be as many."
            )
        blocks = {block.path for block in roles.blocks(base)}
        found = target.modules(config, base, sorted(blocks))
        if wrong := [path for path, _ in found if path not in blocks]:
            raise ValueError(
                f"ShadowConfig: {wrong[0]!r} is no block of {type(base).__name__}; there are {', '.join(blocks)}. Name "
                "whole blocks in target_modules, or leave it out: then it is all of them."
            )
        last = found[-1][0]
        return [Place(path, module, role="last" if path == last else "") for path, module in found]

    @classmethod
    def shared(cls, config: ShadowConfig, base: nn.Module, places: list[Place]) -> Mirror:
        sizes = {
            "shadow_num_hidden_layers": config.shadow_num_hidden_layers or 1,
            "shadow_hidden_size": config.shadow_hidden_size,
            "shadow_intermediate_size": config.shadow_intermediate_size,
            "shadow_num_attention_heads": config.shadow_num_attention_heads,
        }
        return Mirror(backbones(base)[0], sizes, config.share_embeddings, config.auxiliary_loss_weight)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        h, frame = base(x), current()
        assert frame is not None
        difference = F.dropout(h - frame.states[self.source].to(h), self.dropout, self.training)
        return h + self.alpha * linear(self.W_up, linear(self.W_down, difference))

    def advanced(self, state: Tensor, y: Tensor) -> Tensor:
        if not self.moves:
            return state
        gate = torch.sigmoid(_made(self.G, y))
        state = state.to(y.device)
        return state + (gate * (_made(self.T, y) - state)).to(state)


def _two_layers(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def _made(network: Any, y: Tensor) -> Tensor:
    """In the dtype of y."""
    down, act, up = network
    return linear(up, act(linear(down, y)))
