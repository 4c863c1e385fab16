"""X-LoRA folders of the field's library: the network that mixes, and the names of the LoRAs' own folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.composition import Node, Sum
from ..core.routers import XLoraRouter
from ..methods.lora import LoraConfig
from ..methods.xlora import XLoraConfig
from . import files
from .configs import readable
from .files import WEIGHTS

_ROOT = "base_model.internal_xlora_classifier.layers."


def is_one(said: Mapping[str, Any]) -> bool:
    """Whether this is the configuration of an X-LoRA."""
    return said.get("peft_type") == "XLORA"


def expert(where: Path, name: str, folder: str) -> Path:
    """The folder of a LoRA. Raises FileNotFoundError where it is not there: an X-LoRA's own folder does not hold it."""
    for path in (Path(folder), where / folder):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"{where} is an X-LoRA of adapters in folders of their own, and {folder!r}, that of {name!r}, is not there. "
        'Write where it is into "adapters" of its adapter_config.json.'
    )


def fill(router: XLoraRouter, config: XLoraConfig, where: Path) -> None:
    """Writes the network of a folder into a router.

    The field (0.21) takes layer i for a part of the adapter called i, and writes it into that one's sub-folder.

    Raises:
        ValueError: a layer is in neither place, or has another shape.
    """
    found = {k: t for k, t in files.read_tensors(where / WEIGHTS).items() if k.startswith(_ROOT)}
    for name in config.adapters:
        if (lost := where / name / WEIGHTS).is_file():
            own = files.read_tensors(lost)
            found |= {f"{_ROOT}{name}.{n}": own[_ROOT + n] for n in ("weight", "bias") if _ROOT + n in own}
    wanted = _named(router, config.xlora_dropout_p > 0)
    if missing := [key for key in wanted if key not in found]:
        raise ValueError(
            f"{where} is an X-LoRA without {', '.join(missing)}, of the network that mixes its adapters. The field's "
            f"library writes layer 0 into the sub-folder 0: bring all sub-folders along."
        )
    if wrong := [
        f"{k}: {tuple(found[k].shape)}, not {tuple(p.shape)}" for k, p in wanted.items() if found[k].shape != p.shape
    ]:
        raise ValueError(f"{where} is an X-LoRA of another model or of other adapters: {'; '.join(wrong)}.")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(found[key])


def described(
    adapters: Mapping[str, Adapter], node: Node, where: Path, base: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The configuration and the network as the field reads them; None where it has no such thing."""
    router = node.router if isinstance(node, Sum) else None
    if not isinstance(node, Sum) or not isinstance(router, XLoraRouter) or router.mlp is None:
        return None
    names = [child for child in node.children if isinstance(child, str)]
    theirs = all(type(a.config) is LoraConfig and readable(a.config, a, base) for a in adapters.values())
    if names != list(node.children) or set(names) != set(adapters) or "default" in adapters or not theirs:
        return None
    config = XLoraConfig(
        adapters={str(i): str((where / name).resolve()) for i, name in enumerate(names)},
        hidden_size=router.hidden_size,
        enable_softmax=router.softmax,
        enable_softmax_topk=router.softmax_top_k,
        layerwise_scalings=router.layerwise,
        xlora_depth=router.depth,
        xlora_size=router.size,
        xlora_dropout_p=router.dropout,
        softmax_temperature=router.temperature,
        top_k_lora=router.top_k,
        global_scaling_weight=router.scale,
        task_type="CAUSAL_LM",
        base_model_name_or_path=next(iter(adapters.values())).config.base_model_name_or_path,
    )
    return config.to_dict(), {k: p.detach() for k, p in _named(router, router.dropout > 0).items()}


def _named(router: XLoraRouter, drops: bool) -> dict[str, nn.Parameter]:
    """The network's parameters by the field's keys: a ReLU and, if there is one, a dropout stand between its layers."""
    assert router.mlp is not None
    layers: Sequence[nn.Linear] = [m for m in router.mlp if isinstance(m, nn.Linear)]
    step = 3 if drops else 2
    return {f"{_ROOT}{step * i}.{n}": p for i, layer in enumerate(layers) for n, p in layer.named_parameters()}
