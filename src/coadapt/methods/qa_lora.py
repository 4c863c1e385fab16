from dataclasses import replace

from torch import Tensor

from ..core.layer import Layer
from ..core.method import register
from ..inits import Begun
from .lora import LoRA, LoraConfig


@register(LoraConfig, variant="QA_LORA")
class QALoRA(LoRA):
    """W' = W + (alpha / r) B A P, P x = the mean of each group of inputs, times the number of groups

    QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, Xu et al. 2023, arXiv:2309.14717. The
    change is constant along each group of inputs, so that it can go into the zero points of weights that are quantised
    by such groups. The mean of a group is scaled as in peft, by how many there are. peft has it for GPTQ's layers
    alone, and cannot merge it. Use it on a base that stays quantised. Parameters per site: r (O + I / g).
    """

    kinds = ("linear",)

    def begun(self, config: LoraConfig, layer: Layer, r: int) -> Begun:
        inside, self.group = layer.shape[1], config.qalora_group_size
        if inside % self.group:
            raise ValueError(
                f"LoraConfig: qalora_group_size={self.group} does not divide the {inside} inputs of {layer.path!r}."
            )
        begun = super().begun(config, layer, r)
        a, b = begun.pair
        return replace(begun, pair=(a[:, : inside // self.group].clone(), b))  # (R, I / g)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        spread = self.A.shape[1] / self.group
        return self.A.repeat_interleave(self.group, 1) * spread, self.B, self.scale
