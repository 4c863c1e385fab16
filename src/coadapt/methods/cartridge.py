from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import AttentionConfig
from ..core.method import register
from .prefix import Joined, PrefixTuning


@dataclass(frozen=True, kw_only=True)
class CartridgeConfig(AttentionConfig):
    """The keys and values of a text, trained: a cache that has been distilled."""

    kind = "CARTRIDGE"
    prefix_type: ClassVar[str] = "joint"
    prefix_layout: ClassVar[str] = "own"
    prefix_projection: ClassVar[bool] = False
    encoder_hidden_size: ClassVar[int | None] = None
    init_weights: ClassVar[str | None] = None

    num_frozen_tokens: int = 1
    """How many of the first tokens stay as they are: attention rests on the first, and training is steadier so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n, frozen = self.num_virtual_tokens, self.num_frozen_tokens
        if not 0 <= frozen <= n:
            raise ValueError(f"CartridgeConfig: num_frozen_tokens={frozen} must lie between 0 and the {n} tokens.")


@register(CartridgeConfig)
class Cartridge(PrefixTuning):
    """base(q, [F_k; P_k; k], [F_v; P_v; v]), F frozen

    Cartridges: Lightweight and general-purpose long context representations via self-study, Eyuboglu et al. 2025,
    arXiv:2506.06266. It starts from a text (`initialize_kv_prefix_from_text`) or a cache
    (`initialize_kv_prefix_from_past_key_values`), and is then what the model makes of the text's first N tokens.
    Different from the field: without either it starts small, as a prefix does; several are joined by a Seq, or by
    `combine(how="cat")` into one prefix. Use it for one long text that is asked about often. Parameters per site:
    2 (N - frozen) H D.
    """

    F: Tensor

    def __init__(self, config: Any, place: Joined, base: Any, shared: nn.Module | None = None) -> None:
        super().__init__(config, place, base, None)
        frozen, trained = self.P.detach().split([config.num_frozen_tokens, len(self.P) - config.num_frozen_tokens])
        self.P = nn.Parameter(trained.clone())  # (N - frozen, 2, H, D): keys, then values
        self.register_buffer("F", frozen.clone())  # (frozen, 2, H, D)

    @classmethod
    def facts(cls, config: Any, base: Any) -> dict[str, Any]:
        return {name: value for name, value in super().facts(config, base).items() if name != "encoder_hidden_size"}

    def prefix(self) -> tuple[Tensor, Tensor]:
        keys, values = torch.cat([self.F, self.P]).permute(1, 2, 0, 3)  # each (H, N, D)
        return keys, values

    def start_at(self, both: Tensor) -> None:
        self.F.copy_(both[: len(self.F)])
        self.P.copy_(both[len(self.F) :])
