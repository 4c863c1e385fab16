from dataclasses import dataclass

from torch import nn

from ..config import TargetedConfig
from ..core import target
from ..core.adapter import ModuleCopy
from ..core.method import Place, register


@dataclass(frozen=True, kw_only=True)
class FullCopyConfig(TargetedConfig):
    """Full, trained copies of the targeted modules, whatever they are; the base keeps its own."""

    kind = "FULL_COPY"


@register(FullCopyConfig)
class FullCopy(ModuleCopy):
    """copy(x), in place of base(x)

    Fine-tuning in the plain sense, of the modules that are named. Beside another method in one adapter the same is
    `modules_to_save`. Use it for a new head, or to compare with plain fine-tuning of the same modules. Parameters per
    site: all of the module.
    """

    @classmethod
    def places(cls, config: FullCopyConfig, base: nn.Module) -> list[Place]:
        if config.target_modules is None:
            paths = (path.rpartition(".")[2] for path, _ in base.named_modules())
            there = ", ".join(dict.fromkeys(name for name in paths if name and not name.isdigit()))
            raise ValueError(f"FullCopyConfig: target_modules must name the modules to copy; there are: {there}.")
        return [Place(path, module) for path, module in target.modules(config, base, ())]
