"""A vocabulary that was resized: its embeddings are written with an adapter, and read into rows beside the base's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..core.adapter import Adapter, ModuleCopy, make
from ..core.roles import path_of, word_embeddings
from ..core.store import value
from ..core.tied import weights
from ..methods.trainable_tokens import KeptRows, TrainableTokens, TrainableTokensConfig
from .files import WEIGHTS

ROOT = "base_model.model."
"""Before every module path, as the field writes it."""


def embeddings(base: Any) -> dict[str, nn.Module]:
    """The input embedding, and the head where its weight is another one, by path; nothing where there are none."""
    weight = weights(base, word_embeddings(base))
    distinct = {id(weight[m]): m for m in reversed(weight)}
    return {path_of(base, m): m for m in reversed(distinct.values())}


def original_size(base: Any) -> int | None:
    """How many tokens the base knows where it was loaded from; None where that cannot be told."""
    from transformers import PretrainedConfig

    name = getattr(base, "name_or_path", "")
    if not name:
        return None
    try:
        said, _ = PretrainedConfig.get_config_dict(name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return said.get("vocab_size") or said.get("text_config", {}).get("vocab_size")


def kept(adapter: Adapter, base: Any, asked: bool | str) -> dict[str, Tensor]:
    """The embeddings that the file of an adapter holds besides: all if `asked`, with "auto" where they were resized.

    Rows that the adapter trains, or keeps already, are not written twice.
    """
    found = embeddings(base)
    if asked is False or not found:
        return {}
    if asked == "auto":
        first = next(iter(found.values()))
        before, now = original_size(base), len(first.get_parameter("weight"))
        if before in (None, now) or _covers(adapter, base, first, range(before or 0, now)):
            return {}
    own = {p.place.module for p in adapter.parts if isinstance(p.method, ModuleCopy | KeptRows)}
    return {f"{ROOT}{path}.weight": value(m, "weight") for path, m in found.items() if m not in own}


def _covers(adapter: Adapter, base: nn.Module, embedding: nn.Module, new: range) -> bool:
    weight = weights(base, [embedding, *(part.place.module for part in adapter.parts)])
    methods = [part.method for part in adapter.parts if weight[part.place.module] is weight[embedding]]
    rows = {row for method in methods if isinstance(method, TrainableTokens) for row in method.ids.tolist()}
    return any(isinstance(method, ModuleCopy) for method in methods) or rows >= set(new)


def taken(adapter: Adapter, base: Any, tensors: Mapping[str, Tensor], half: bool, file: Path) -> set[str]:
    """The keys of embeddings in `tensors`; where rows differ from the base's, the adapter gets them, the base does not.

    Raises:
        ValueError: the base's vocabulary is smaller. It is not resized here.
    """
    done: set[str] = set()
    for path, module in embeddings(base).items():
        own = value(module, "weight")
        key = next((k for k in _keys(path) if k in tensors), None)
        if key is None or own.is_meta or tensors[key].shape[1:] != own.shape[1:]:
            continue
        stored = tensors[key]
        if len(stored) > len(own):
            raise ValueError(
                f"{file} was trained with a vocabulary of {len(stored)} tokens, this base has {len(own)}. Resize it "
                f"first, which coadapt never does by itself: base.resize_token_embeddings({len(stored)}); the adapter "
                "brings the new rows."
            )
        lesser = min((own.dtype, stored.dtype), key=lambda d: d.itemsize)
        differ = (own[: len(stored)].cpu().to(lesser) != stored.to(lesser)).any(1).nonzero()[:, 0]
        if len(differ):
            _keep(adapter, base, path, differ, stored, half)
        done.add(key)
    return done


def _keep(adapter: Adapter, base: nn.Module, path: str, ids: Tensor, stored: Tensor, half: bool) -> None:
    named = None if path == next(iter(embeddings(base))) else [path]
    config = TrainableTokensConfig(token_indices=ids.tolist(), target_modules=named)
    for i, place in enumerate(TrainableTokens.places(config, base)):
        method = make(KeptRows, config, place, base, half)
        assert isinstance(method, KeptRows)
        method.rows.copy_(stored[ids])
        adapter.add(place, method)
        adapter.parts.insert(i, adapter.parts.pop())  # what else the adapter does there comes after


def rows_needed(folder: Path, base: Any) -> int:
    """How many tokens `base` must know for the embeddings that lie in `folder`; 0 where there are none."""
    keys = {key for path in embeddings(base) for key in _keys(path)}
    sizes: list[int] = []
    for file in (folder / WEIGHTS, *sorted(folder.glob(f"*/{WEIGHTS}"))):
        if file.is_file():
            with safe_open(file, "pt") as tensors:
                sizes += [tensors.get_slice(key).get_shape()[0] for key in keys & set(tensors.keys())]
    return max(sizes, default=0)


def _keys(path: str) -> tuple[str, str]:
    """Of an embedding in files: as it is, and where an adapter sits on it."""
    return f"{ROOT}{path}.weight", f"{ROOT}{path}.base_layer.weight"
