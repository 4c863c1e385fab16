"""The quantisers that are tested here, each as a way to quantise the linear layers of a small model."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coadapt import PeftModel
from models import llama

GROUP = 32


@dataclass(frozen=True)
class Quantiser:
    """How a linear layer is quantised, and how far its call may be from the product with the weight that is read."""

    library: str
    make: Callable[[nn.Linear], nn.Module]
    within: float = 1e-5


def four_bit(kind: str, double: bool = False) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        library: Any = importlib.import_module("bitsandbytes.nn")
        made = library.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight = layer.weight.detach()
        made.weight = library.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=double, module=made
        )
        made.bias = layer.bias
        return made.to("cpu")

    return make


def eight_bit(layer: nn.Linear) -> nn.Module:
    library: Any = importlib.import_module("bitsandbytes.nn")
    made = library.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    made.weight = library.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


def torchao(config: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        library: Any = importlib.import_module("torchao.quantization")
        if "bits" in options:
            options["weight_dtype"] = getattr(torch, f"int{options.pop('bits')}")
            options["granularity"] = library.PerGroup(GROUP)
        layer.requires_grad_(False)
        library.quantize_(layer, getattr(library, config)(**options))
        return layer

    return make


def hqq(bits: int, axis: int) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        library: Any = importlib.import_module("hqq.core.quantize")
        config = library.BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=axis)
        return library.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")

    return make


def grid(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points, (O, groups): each group's smallest to largest value, in even steps."""
    parts = [weight[:, groups == k] for k in range(int(groups.max()) + 1)]
    low = torch.stack([p.amin(1).clamp(max=0) for p in parts], 1)
    scales = (torch.stack([p.amax(1) for p in parts], 1) - low).clamp(min=1e-4) / (2**bits - 1)
    return scales, (-low / scales).round().clamp(0, 2**bits - 1)


def gptq(bits: int, order: bool = False) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        library: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
        made = library.TorchLinear(**_shape(layer, bits, order))
        groups = torch.arange(layer.in_features) // GROUP
        groups = groups[torch.randperm(len(groups))] if order else groups
        made.pack(layer, *grid(layer.weight.detach(), bits, groups), groups.int())
        made._init_wf_unsqueeze_buffers()
        made.qzero_format(format=2)
        return made

    return make


def awq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        library: Any = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq")
        made = library.AwqTorchLinear(**_shape(layer, bits, False))
        made.pack(layer, *grid(layer.weight.detach(), bits, torch.arange(layer.in_features) // GROUP))
        return made

    return make


def _shape(layer: nn.Linear, bits: int, order: bool) -> dict[str, Any]:
    return {
        "bits": bits,
        "group_size": GROUP,
        "sym": False,
        "desc_act": order,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "register_buffers": True,
    }


ROUNDS_INPUT = 0.05
"""Of kernels that round their input to 8 bits."""

QUANTISERS = {
    "bnb-nf4": Quantiser("bitsandbytes", four_bit("nf4")),
    "bnb-nf4-double": Quantiser("bitsandbytes", four_bit("nf4", double=True)),
    "bnb-fp4": Quantiser("bitsandbytes", four_bit("fp4")),
    "bnb-int8": Quantiser("bitsandbytes", eight_bit, ROUNDS_INPUT),
    "torchao-int8": Quantiser("torchao", torchao("Int8WeightOnlyConfig")),
    "torchao-int8-dynamic": Quantiser("torchao", torchao("Int8DynamicActivationInt8WeightConfig"), ROUNDS_INPUT),
    "torchao-int4": Quantiser("torchao", torchao("IntxWeightOnlyConfig", bits=4)),
    "torchao-float8": Quantiser("torchao", torchao("Float8WeightOnlyConfig")),
    "hqq-4bit": Quantiser("hqq", hqq(4, axis=1)),
    "hqq-8bit": Quantiser("hqq", hqq(8, axis=0)),
    "gptq-4bit": Quantiser("gptqmodel", gptq(4)),
    "gptq-3bit-order": Quantiser("gptqmodel", gptq(3, order=True)),
    "awq-4bit": Quantiser("gptqmodel", awq(4), 5e-3),  # multiplies in float16
}


def make(name: str) -> Any:
    """A small Llama whose linear layers, but for the head, are quantised. Skips where the library is missing."""
    quantiser = QUANTISERS[name]
    if importlib.util.find_spec(quantiser.library) is None:
        pytest.skip(f"{quantiser.library} is not installed")
    torch.manual_seed(0)
    base = llama(hidden_size=64, intermediate_size=128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about themselves
        for path, module in list(base.named_modules()):
            if isinstance(module, nn.Linear) and path != "lm_head":
                base.set_submodule(path, quantiser.make(module))
    return base.requires_grad_(False).eval()


def as_floats(base: Any) -> Any:
    """The same with its quantised weights held as plain floats."""
    from coadapt.core.repacking import dequantise

    PeftModel(base)._end()  # has the quantisers known, and steadied as a view has them
    dequantise(base)
    return base
