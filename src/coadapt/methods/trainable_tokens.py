from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TargetedConfig, TokensConfig
from ..core import roles, target
from ..core.backbone import backbones
from ..core.bypass import holders
from ..core.layer import Layer
from ..core.method import Companion, Method, Place, WeightMethod, register


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(TargetedConfig):
    """The embeddings of some tokens, trained; of a head that is tied to them, too."""

    kind = "TRAINABLE_TOKENS"

    token_indices: Sequence[int]
    """The ids of the tokens, such as those that were added to the vocabulary."""
    init_weights: bool = True
    """True: start from the base's rows; False: random, with their spread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = list(self.token_indices)
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if not ids or wrong or len(set(ids)) < len(ids):
            raise ValueError(f"TrainableTokensConfig: token_indices={ids} must be token ids, each once, at least one.")


@register(TrainableTokensConfig)
class TrainableTokens(WeightMethod):
    """W' = W, with other rows for some tokens

    The plain way to teach new tokens: only their embeddings train. Use it for new tokens, alone or beside a LoRA.
    Parameters per site: D for each token.
    """

    widens = False
    kinds = ("embedding", "linear")

    def __init__(self, config: TrainableTokensConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        self.embeds = layer.kind.name == "embedding"
        weight = layer.weight().mT if self.embeds else layer.weight()  # (V, D)
        if max(config.token_indices) >= len(weight):
            raise ValueError(
                f"TrainableTokensConfig: {layer.path!r} ({type(layer.module).__name__}) has {len(weight)} rows; "
                f"token_indices go up to {max(config.token_indices)}. Resize the base's "
                "vocabulary first: base.resize_token_embeddings(len(tokenizer))."
            )
        self.ids = torch.tensor(list(config.token_indices))  # (N,)
        self.sorted = tuple(self.ids.sort())  # and where each stood
        rows = weight[self.ids.to(weight.device)].clone()
        self.rows = nn.Parameter(rows if config.init_weights else torch.randn_like(rows) * weight.std())  # (N, D)

    @classmethod
    def places(cls, config: TrainableTokensConfig, base: Any) -> list[Place]:
        usual: list[str] = []
        if config.target_modules is None:
            if not hasattr(base, "get_input_embeddings"):
                raise ValueError(
                    f"TrainableTokensConfig: nothing says which module of {type(base).__name__} embeds its input; name "
                    "target_modules."
                )
            usual = [roles.path_of(base, place.embedding) for place in backbones(base)]
        found = target.layers(_called(config, base), base, usual)
        return [Place(path, module) for path, module in roles.with_tied(base, found)]

    def share(self, earlier: Method) -> None:
        if isinstance(earlier, TrainableTokens):
            self.rows = earlier.rows

    def merge(self, weight: Tensor) -> Tensor:
        ids, weight = self.ids.to(weight.device), weight.to(self.rows.dtype)
        return weight.index_copy(1, ids, self.rows.mT) if self.embeds else weight.index_copy(0, ids, self.rows)

    def forward(self, x: Tensor, base: Layer) -> Tensor:
        y = base(x)
        if self.embeds:
            ids, order = (t.to(x.device) for t in self.sorted)
            at = torch.searchsorted(ids, x.contiguous()).clamp(max=len(ids) - 1)  # which of them a token would be
            rows = F.embedding(order[at], self.rows) * getattr(base.module, "embed_scale", 1.0)
            return torch.where((ids[at] == x)[..., None], rows.to(y.dtype), y)
        ids, bias = self.ids.to(x.device), base.bias
        scores = F.linear(x, self.rows.to(x.dtype), None if bias is None else bias[ids].to(x.dtype))
        return y.index_copy(-1, ids, scores.to(y.dtype))


def _called(config: TrainableTokensConfig, base: nn.Module) -> TrainableTokensConfig:
    """With those in place of a module that only holds their weight and is never called (T5's `shared`)."""
    targets = config.target_modules
    names = [targets] if isinstance(targets, str) else list(targets or ())
    tied = {n: own for path, own in holders(base).items() for n in names if target.suffix_match(path, n)}
    if not tied:
        return config
    return replace(config, target_modules=[path for name in names for path in tied.get(name, [name])])


class KeptRows(TrainableTokens):
    """Rows of a resized vocabulary, as they were when the adapter was saved. They do not train."""

    def __init__(self, config: TrainableTokensConfig, layer: Layer, shared: nn.Module | None = None) -> None:
        super().__init__(config, layer, shared)
        rows = self.rows.detach()
        del self.rows
        self.register_buffer("rows", rows)


class WithTokens:
    """Mixed into a method whose configuration has a field `trainable_token_indices`."""

    @classmethod
    def companions(cls, config: Any, base: nn.Module, places: list[Place]) -> list[Companion]:
        inherited: Any = super()
        return [*inherited.companions(config, base, places), *beside_tokens(config, base)]


def beside_tokens(config: TokensConfig, base: nn.Module) -> list[Companion]:
    """What trains the single tokens that a configuration names beside its method."""
    tokens, who = config.trainable_token_indices, type(config).__name__
    named = tokens if isinstance(tokens, Mapping) else {None: tokens} if tokens else {}
    found: list[Companion] = []
    for name, ids in named.items():
        own = TrainableTokensConfig(token_indices=ids, target_modules=None if name is None else [name])
        places = TrainableTokens.places(own, base)
        paths = {place.path for place in places}
        earlier: Any = next((c.config for c in found if paths & {place.path for place in c.places}), None)
        if earlier is None:
            found.append(Companion(TrainableTokens, own, places))
        elif earlier != replace(own, target_modules=earlier.target_modules):
            raise ValueError(
                f"{who}: trainable_token_indices names {name!r} and what it is tied to, with other tokens. "
                "They have one weight: name one of them, or the same tokens for both."
            )
    return found
