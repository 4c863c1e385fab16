"""What an optimiser gets of a view: a group for each member that trains, with a rate of its own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .methods.lora import loras


def param_groups(members: Mapping[str, nn.Module], options: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One group for each member that trains; two where one has a `loraplus_lr_ratio`.

    Args:
        members: name -> adapter, or gates.
        options: name -> the optimiser's options.

    Raises:
        ValueError: a ratio where there is no LoRA, or no rate.
    """
    found: list[dict[str, Any]] = []
    for name, member in members.items():
        if trained := [p for p in member.parameters() if p.requires_grad]:
            found += _groups(name, member, trained, options[name])
    return found


def _groups(
    name: str, member: nn.Module, trained: list[nn.Parameter], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One optimiser group, or two where B learns faster than A."""
    own = dict(options)
    ratio = own.pop("loraplus_lr_ratio", None)
    if ratio is None:
        return [{"params": trained, "name": name, **own}]
    ups = {id(method.B) for embeds, method in loras(member) if not embeds}
    fast, slow = [p for p in trained if id(p) in ups], [p for p in trained if id(p) not in ups]
    if not fast or "lr" not in own:
        raise ValueError(
            f"param_groups: loraplus_lr_ratio={ratio} has no effect on {name!r}: it needs a LoRA that trains and an lr."
        )
    groups = {own["lr"]: slow, own["lr"] * ratio: fast} if ratio != 1 else {own["lr"]: trained}
    return [{"params": found, "name": name, **own, "lr": rate} for rate, found in groups.items() if found]
