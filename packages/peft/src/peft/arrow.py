"""Arrow routing over adapters in folders, by the field's call for it; the router is coadapt's (docs/routing.md)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coadapt import Arrow, Sum
from coadapt.methods.lora import LoRA

from .views import PeftModel


@dataclass
class ArrowConfig:
    """How tokens choose among LoRAs: arXiv:2405.11157; GenKnowSub: arXiv:2505.10939."""

    top_k: int = 3
    """How many of them a token uses."""
    router_temperature: float = 1.0
    """Of the softmax over those."""
    use_gks: bool = False
    """Subtract the mean of general LoRAs from each of the others first."""
    task_adapter_names: list[str] | None = field(default=None, init=False)
    """What `create_arrow_model` has called them."""
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    """What it has called the general ones."""
    rng_seed: int | None = None
    """Taken as there: nothing is drawn, directions are worked out exactly."""

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.router_temperature <= 0:
            raise ValueError(
                f"ArrowConfig: top_k={self.top_k} and router_temperature={self.router_temperature} are > 0."
            )


@torch.no_grad()
def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | Path],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | Path] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A view with the LoRAs of some folders, "task_0" and so on, among which each token chooses at every layer.

    Args:
        general_adapter_paths: of GenKnowSub: LoRAs of general knowledge, whose mean is subtracted, A and B apart.
        adapter_kwargs: as `PeftModel.from_pretrained` takes them.

    Raises:
        ValueError: no folders, general ones without `use_gks` or the other way round, or LoRAs of unlike shapes there.
        TypeError: another method than LoRA.
    """
    if not task_specific_adapter_paths:
        raise ValueError("create_arrow_model needs at least one folder in task_specific_adapter_paths.")
    if arrow_config.use_gks != bool(general_adapter_paths):
        raise ValueError("general_adapter_paths and ArrowConfig(use_gks=True) belong together: give both or neither.")
    view = PeftModel(base_model)
    try:
        tasks = _loaded(view, "task", task_specific_adapter_paths, adapter_kwargs)
        general = _loaded(view, "gks", general_adapter_paths or (), adapter_kwargs)
        arrow_config.task_adapter_names, arrow_config.gks_adapter_names = tasks, general
        if general:
            _subtract([_factors(view, name) for name in general], [_factors(view, name) for name in tasks])
        top_k = arrow_config.top_k if arrow_config.top_k < len(tasks) else None
        view.set_adapter(Sum(*tasks, weights=Arrow(top_k, arrow_config.router_temperature)))
    except BaseException:
        view.unload()
        raise
    return view.eval()


def _loaded(view: PeftModel, what: str, folders: Sequence[str | Path], options: dict[str, Any]) -> list[str]:
    names = [f"{what}_{i}" for i in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        view.load_adapter(folder, name, **options)
        _factors(view, name)
    return names


def _factors(view: PeftModel, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for part in view.get_adapter(name).parts:
        if not isinstance(part.method, LoRA):
            raise TypeError(f"{name!r} is no LoRA at {part.place.path!r}; Arrow compares what LoRAs read.")
        found |= {f"{part.place.path}.A": part.method.A, f"{part.place.path}.B": part.method.B}
    return found


def _subtract(general: Sequence[dict[str, Tensor]], tasks: Sequence[dict[str, Tensor]]) -> None:
    shapes = [{key: tensor.shape for key, tensor in each.items()} for each in (*general, *tasks)]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("GenKnowSub subtracts A from A and B from B: all LoRAs need the same layers and ranks.")
    for key in general[0]:
        mean = torch.stack([each[key] for each in general]).mean(0)
        for each in tasks:
            each[key].sub_(mean)
