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


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, past_key_values: Any, adapter_name: str | None = None
) -> None:
    """Has a cartridge or a prefix stand at the first N keys and values of a cache of one row.

    Args:
        model: a `PeftModel`. past_key_values: as the base returns it with `use_cache=True`; keys (1, H, S, D), S >= N.

    Raises:
        ValueError: the cache has another shape.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    layers = getattr(past_key_values, "layers", None)
    pairs = [tuple(pair)[:2] for pair in past_key_values] if layers is None else [(c.keys, c.values) for c in layers]
    for part in model.get_adapter(name).parts:
        if not isinstance(part.method, PrefixTuning) or part.place.role != "decoder":
            raise ValueError(f"{name!r} is a {type(part.method).__name__} at {part.place.path!r}, which has no cache.")
        n, _, heads, dim = part.method.shape
        number: Any = part.place.module.layer_idx
        keys, values = pairs[number]
        if keys.shape[:2] != (1, heads) or keys.shape[3] != dim or keys.shape[2] < n:
            raise ValueError(
                f"{name!r} needs keys of shape (1, {heads}, at least {n}, {dim}) at {part.place.path!r}; the cache has "
                f"{tuple(keys.shape)}."
            )
        part.method.start_at(torch.stack([keys[0, :, :n], values[0, :, :n]]).permute(2, 0, 1, 3))


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> None:
    """The same with what the base makes of a text, as a system's message where the tokenizer has a template for it.

    Raises:
        ValueError: the text has fewer tokens than the adapter.
    """
    name = model.active_adapter if adapter_name is None else adapter_name
    n = model.peft_config[name].num_virtual_tokens
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        said = [{"role": "system", "content": text}]
        ids = list(tokenizer.apply_chat_template(said, add_generation_prompt=False, return_dict=False))
    else:
        ids = list(tokenizer(text)["input_ids"])
    if len(ids := ids[:max_length]) < n:
        raise ValueError(f"The text has {len(ids)} tokens, and {name!r} has {n}. Give a longer text, or fewer tokens.")
    base = model.get_base_model()
    first = torch.tensor([ids[:n]], device=next(base.parameters()).device)  # what comes later changes nothing in them
    cache = base(input_ids=first, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, adapter_name=name)
