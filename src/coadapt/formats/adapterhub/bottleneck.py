"""Bottlenecks and Compacters, with or without invertible adapters."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...config import PeftConfig
from ...core import roles
from ...core.adapter import Adapter
from ...core.target import layer_index
from ...methods.bottleneck import Bottleneck, BottleneckConfig
from ...methods.compacter import CompacterConfig
from ...methods.invertible import Invertible
from .tensors import Fill, Tensors, activation, copy


def read(config: Mapping[str, Any], tensors: Tensors, base: Any) -> tuple[PeftConfig, Fill]:
    paths = tensors.paths("adapters")
    products = bool(config.get("phm_layer"))
    sizes = {
        tensors.by_place["adapters", path, "adapter_down.0." + ("b" if products else "bias")].shape[0] for path in paths
    }
    if len(sizes) != 1:
        raise ValueError(f"Bottlenecks of widths {sorted(sizes)} in one adapter are not read.")
    options: dict[str, Any] = {
        "bottleneck_size": sizes.pop(),
        "non_linearity": activation(config["non_linearity"]),
        "scaling": config.get("scaling", 1.0),
        "adapter_dropout": config.get("dropout", 0.0),
        "stochastic_depth": config.get("stochastic_depth", 0.0),
        **_placement(config, paths, base),
    }
    if config.get("inv_adapter"):
        _refuse_embedding(base)
        options |= {
            "inv_adapter": config["inv_adapter"],
            "inv_adapter_reduction_factor": float(config["inv_adapter_reduction_factor"]),
        }
    made: PeftConfig = BottleneckConfig(**options)
    if products:
        made = CompacterConfig(
            **options,
            phm_dim=config["phm_dim"],
            phm_rank=config["phm_rank"] if config["factorized_phm_W"] else 1,
            factorized_phm_W=config["factorized_phm_W"],
            shared_phm_rule=config["shared_phm_rule"],
        )

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            if isinstance(part.method, Invertible):
                _fill_invertible(part.method, tensors)
            elif isinstance(part.method, Bottleneck):
                _fill_bottleneck(part.method, _location(part.place.path, paths) or part.place.path, tensors)
        if adapter.shared is not None:
            rule: Any = adapter.shared
            path = next(iter(tensors.paths("shared_parameters")), "")  # `adapters` forgets it in encoder-decoders
            copy(tensors.take("shared_parameters", path, "phm_rule").mT, rule.A, "phm_rule")

    return made, fill


def _placement(config: Mapping[str, Any], paths: list[str], base: Any) -> dict[str, Any]:
    """Where such an adapter reads and writes, of what can be said here."""
    said = tuple(config.get(k) for k in ("original_ln_before", "original_ln_after", "residual_before_ln"))
    attention, output = bool(config.get("mh_adapter")), bool(config.get("output_adapter"))
    layers = {"layers_to_transform": sorted({n for path in paths if (n := layer_index(path)) is not None})}
    if config.get("is_parallel") and (attention, output) == (False, True):
        return {"placement": "parallel", "reads": "stream", **layers}
    blocks = roles.blocks(base)
    match said:
        case (False, True, True | False):
            ends = [end for block in blocks for end, _ in (*block.attention, *(block.feed_forward or ())[1:])]
            return {"target_modules": [end for end in ends if _location(end, paths)]}
        case (True, True, True) if output and not attention:
            return {"placement": "pfeiffer", "reads": "stream", **layers}
        case (True, False, False) if output and not attention:  # behind all of a block, its last norm too
            behind = [roles.norms_around(base, block)[1] for block in blocks]
            at = [norm[0] if norm else block.path for norm, block in zip(behind, blocks, strict=True)]
            return {"target_modules": [path for path in at if _location(path, paths)]}
        case _:
            told = {k: v for k, v in config.items() if re.search("original_ln|residual|adapter$", k)}
            raise ValueError(f"A bottleneck at such a place is not read: {told}.")


def _refuse_embedding(base: Any) -> None:
    """Theirs stands behind all that makes the first hidden states, ours right behind the embedding of the tokens."""
    blocks = tuple(f"{block.path}." for block in roles.blocks(base))
    outside = [m for path, m in base.named_modules() if isinstance(m, nn.Embedding) and not path.startswith(blocks)]
    if len(outside) > 1:
        raise ValueError(
            f"AdapterHub's invertible adapter stands behind positions and norms, which {type(base).__name__} adds to "
            "the embedding of its tokens; here it would stand before them, and is not read."
        )


def _location(at: str, paths: list[str]) -> str | None:
    """Where the file has what belongs to the place `at`: a module around it, or beside it in its block."""
    if around := [path for path in paths if at.startswith(f"{path}.")]:
        return max(around, key=len)
    kind = "attention_adapters" if re.search(r"attn|attention", at.lower()) else "output_adapters"
    beside = [path for path in paths if path.rpartition(".")[2] == kind and f"{at}.".startswith(_parent(path) + ".")]
    inside = [path for path in paths if path.startswith(f"{at}.")]  # of a whole block, which ends in its second part
    return next(iter((*beside, *inside)), None)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _fill_bottleneck(method: Bottleneck, path: str, tensors: Tensors) -> None:
    for layer, key in ((method.down, "adapter_down.0"), (method.up, "adapter_up")):
        if isinstance(layer, nn.Linear):
            copy(tensors.take("adapters", path, f"{key}.weight"), layer.weight, path)
            copy(tensors.take("adapters", path, f"{key}.bias"), layer.bias, path)
            continue
        if tensors.has("adapters", path, f"{key}.b"):
            copy(tensors.take("adapters", path, f"{key}.b"), layer.bias, path)
        if layer.rule is not None:
            copy(tensors.take("adapters", path, f"{key}.phm_rule").mT, layer.rule.A, path)
        if layer.whole is not None:
            copy(tensors.take("adapters", path, f"{key}.W").mT, layer.whole, path)
        else:  # theirs multiply from the left: (I, O)
            copy(tensors.take("adapters", path, f"{key}.W_right").mT, layer.s, path)
            copy(tensors.take("adapters", path, f"{key}.W_left").mT, layer.t, path)
    if isinstance(method.scale, Tensor):
        method.scale.copy_(tensors.take("adapters", path, "scaling").view(method.scale.shape))


def _fill_invertible(method: Invertible, tensors: Tensors) -> None:
    if method.earlier:
        return
    (path,) = tensors.paths("invertible_adapters")
    for name in ("F", "G"):
        for key, value in getattr(method, name).state_dict(keep_vars=True).items():
            copy(tensors.take("invertible_adapters", path, f"{name}.{key}"), value, name)
