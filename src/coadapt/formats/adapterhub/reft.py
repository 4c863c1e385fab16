"""LoReFT, NoReFT and DiReFT."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ...config import PeftConfig
from ...core.adapter import Adapter
from ...methods.reft import Reft, ReftConfig
from .tensors import Fill, Tensors, activation, copy


def read(config: Mapping[str, Any], tensors: Tensors, base: Any) -> tuple[PeftConfig, Fill]:
    if not config["orthogonality"] and "subtract_projection" not in config:
        warnings.warn(
            "AdapterHub's files of ReFT do not say whether the projection is subtracted. Without orthonormal rows this "
            "is read as NoReFT, as AdapterHub reads it; what was trained as DiReFT is another function.",
            stacklevel=2,
        )
    first = int(config["prefix_positions"])
    last = int(config["suffix_positions"])
    made = ReftConfig(
        layers=config["layers"],
        prefix_positions=first,
        suffix_positions=last,
        r=config["r"],
        orthogonality=config["orthogonality"],
        subtract_projection=config.get("subtract_projection", True),
        tied_weights=bool(config["tied_weights"] and first and last),
        dropout=config.get("dropout", 0.05),
        non_linearity=activation(config["non_linearity"]) if config.get("non_linearity") else None,
    )

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            path = f"{part.place.path}.reft_layer"
            method: Any = part.method
            assert isinstance(method, Reft)
            for n, edit in enumerate((method.first, method.last)):
                if edit is not None:
                    for name in ("weight", "bias"):
                        own = tensors.take("refts", path, f"units.{n}.learned_source.{name}")
                        copy(own, edit.source.get_parameter(name), path)
                    copy(_projection(config, tensors, path, n), edit.R, path)
        idle = [k for k in tensors.by_place if k[0] == "refts" and k[2].startswith(("units.0", "units.1"))]
        tensors.used |= {k for k in idle if k[1] in {f"{p.place.path}.reft_layer" for p in adapter.parts}}

    return made, fill


def _projection(config: Mapping[str, Any], tensors: Tensors, path: str, n: int) -> Tensor:
    """(R, D), from what PyTorch's own parametrisation of orthonormal matrices holds."""
    inside = f"units.{n}.projection"
    if not config["orthogonality"]:
        return tensors.take("refts", path, f"{inside}.weight")
    ends = ("parametrizations.weight.original", "parametrizations.weight.0.base")
    state = {end: tensors.take("refts", path, f"{inside}.{end}") for end in ends}
    rows, width = state[ends[0]].shape
    layer: Any = parametrizations.orthogonal(nn.Linear(width, rows, bias=False))
    layer.load_state_dict(state)
    made: Tensor = layer.weight
    return made.detach()
