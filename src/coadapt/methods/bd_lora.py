from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.layer import Layer
from ..core.method import Place, register
from ..inits import Begun
from ..lora_options import BdLoraConfig
from .lora import LoRA, LoraConfig


@register(LoraConfig, variant="BD_LORA")
class BDLoRA(LoRA):
    """W' = W + (alpha / r) B A, with A or B block-diagonal

    Block-diagonal LoRA for eliminating communication overhead in tensor parallel LoRA serving, Wang et al. 2025,
    arXiv:2510.23346. A layer that is split by its inputs among devices has A in blocks, one that is split by its
    outputs B: so each device multiplies by its own block. The blocks are what is stored. Use it for adapters that are
    to be served so. Parameters per site: r (O / n + I) or r (O + I / n) for n blocks.
    """

    kinds = ("linear",)

    @classmethod
    def places(cls, config: LoraConfig, base: nn.Module) -> list[Place]:
        places = super().places(config, base)
        options = _options(config)
        names = [*(options.target_modules_bd_a or ()), *(options.target_modules_bd_b or ())]
        if idle := [n for n in names if not any(n in _last(place.path) for place in places)]:
            ends = sorted({_last(place.path) for place in places})
            raise ValueError(f"BdLoraConfig: {idle} name none of the targets, which are called {ends}.")
        return places

    def begun(self, config: LoraConfig, layer: Layer, r: int) -> Begun:
        self.blocks, self.in_a, self.in_b = _blocks(config, layer.path)
        n = self.blocks
        out, inside = layer.shape
        if r % n or (self.in_a and inside % n) or (self.in_b and out % n):
            raise ValueError(
                f"BdLoraConfig: nblocks={n} must divide r={r} and the {inside if self.in_a else out} "
                f"{'inputs' if self.in_a else 'outputs'} of {layer.path!r}."
            )
        begun = super().begun(config, layer, r)
        a, b = begun.pair
        a = nn.init.kaiming_uniform_(a[:, : inside // n].clone()) if self.in_a else a  # (R, I / n)
        b = b[:, : r // n].clone() if self.in_b else b  # (O, R / n)
        return replace(begun, pair=(a, b))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        a = torch.block_diag(*self.A.chunk(self.blocks)) if self.in_a else self.A
        b = torch.block_diag(*self.B.chunk(self.blocks)) if self.in_b else self.B
        return a, b, self.scale


def _options(config: LoraConfig) -> BdLoraConfig:
    return BdLoraConfig.of(config.use_bdlora) or BdLoraConfig()


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _blocks(config: LoraConfig, path: str) -> tuple[int, bool, bool]:
    """How many blocks, and whether they are in A or in B. Raises ValueError where that is not told."""
    options = _options(config)
    in_a = any(name in _last(path) for name in options.target_modules_bd_a or ())
    in_b = any(name in _last(path) for name in options.target_modules_bd_b or ())
    if in_a and in_b:
        raise ValueError(f"BdLoraConfig: {path!r} is named by target_modules_bd_a and by target_modules_bd_b.")
    if options.match_strict and not in_a and not in_b:
        raise ValueError(
            f"BdLoraConfig: {path!r} is named neither by target_modules_bd_a nor by target_modules_bd_b. Name it, "
            "leave it out of target_modules, or say match_strict=False to have a plain LoRA there."
        )
    return options.nblocks, in_a, in_b
