"""Does it work here? Adapters on a model made in memory: trained, saved, loaded. And the quantisers' layers."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module, metadata
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils

from coadapt.methods.lora_config import LoraConfig
from coadapt.methods.prompt import PromptTuningConfig
from coadapt.model import PeftModel
from coadapt.training.machine import best, first_line
from coadapt.versions import KNOWN_BAD, OPTIONAL, Finding, fits, found, upgrade


def selftest() -> Iterator[Finding]:
    """A LoRA and a prompt on a tiny model: one step changes both, the base not; the saved ones give the same logits."""
    device = best()
    try:
        with torch.random.fork_rng(enabled=True):
            _whole_way(device)
    except Exception as error:
        mend = "COADAPT_DEBUG=1 coadapt doctor shows where; reinstall with: pip install --force-reinstall coadapt"
        yield Finding(part="self-test", name="adapters", state="broken", said=first_line(error), mend=mend)
        return
    said = f"a LoRA and a prompt on {device.type}: attached, trained for a step, saved, loaded to the same logits"
    yield Finding(part="self-test", name="adapters", state="ok", said=said)


def _whole_way(device: torch.device) -> None:
    base = _base().to(device)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    view = PeftModel(base, LoraConfig(r=2), "lora")
    view.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    view.set_adapter("prompt + lora")
    at_start = {name: view.get_adapter(name).weight.detach().clone() for name in ("lora", "prompt")}
    tokens = torch.arange(3, 19, device=device).view(2, 8)
    optimizer = torch.optim.AdamW(view.param_groups({"lora": 1e-2, "prompt": 1e-2}))
    loss = view(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    for name, start in at_start.items():
        if view.get_adapter(name).weight.equal(start):
            raise RuntimeError(f"a training step left the {name} as it was")
    if not all(value.equal(before[name]) for name, value in base.state_dict().items()):
        raise RuntimeError("a training step changed the base")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        view.save_pretrained(folder)
        again = PeftModel.from_pretrained(_base().to(device), folder)
        if not torch.allclose(again(tokens).logits, view.eval()(tokens).logits, atol=1e-5):
            raise RuntimeError("adapters that were saved and loaded give other logits")


def _base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, **sizes)).eval()


# ---- quantised layers, of the programs that are installed ------------------------------------------------------------


def quantisers() -> Iterator[Finding]:
    """Each quantiser that is installed, on one layer of 64 by 64; and whether transformers takes its version."""
    device = best()
    for name, try_it in QUANTISERS.items():
        version = found(name)
        if version is None:
            yield Finding(part="quantisers", name=name, state="absent", said="not installed", mend=OPTIONAL[name])
            continue
        lowest = getattr(import_utils, f"{name.upper()}_MIN_VERSION", None)
        if lowest is not None and not fits(version, f">={lowest}"):
            said = f"{version} is installed; transformers {metadata.version('transformers')} takes {name}>={lowest}"
            mend = upgrade(name, f">={lowest}")
            yield Finding(part="quantisers", name=name, state="warning", said=said, mend=mend)
            continue
        try:
            error = _error_of(try_it, device)
        except Exception as failed:
            bad = any(fits(version, versions) for versions in KNOWN_BAD.get(name, {}))
            mend = upgrade(name) if bad else None
            said = f"{version} does not work on {device.type}: {first_line(failed)}"
            yield Finding(part="quantisers", name=name, state="warning", said=said, mend=mend)
            continue
        said = f"{version} works on {device.type}: a layer's output is off by {error:.1%}"
        yield Finding(part="quantisers", name=name, state="ok", said=said)


def _error_of(quantise: Callable[[nn.Linear, torch.device], nn.Module], device: torch.device) -> float:
    """The relative error of a quantised layer's output. Raises RuntimeError where it is no such layer any more."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = layer(x).float()
        given: Tensor = quantise(layer, device)(x.to(device)).float().cpu()
    error = ((given - wanted).norm() / wanted.norm()).item()
    if not error < 0.3:
        raise RuntimeError(f"a layer's output is off by {error:.0%}")
    return error


def _bitsandbytes(layer: nn.Linear, device: torch.device) -> nn.Module:
    modules: Any = import_module("bitsandbytes.nn")
    made = modules.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    made.weight = modules.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return made.to(device)


def _torchao(layer: nn.Linear, device: torch.device) -> nn.Module:
    quantization: Any = import_module("torchao.quantization")
    layer.to(device)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


def _quanto(layer: nn.Linear, device: torch.device) -> nn.Module:
    quanto: Any = import_module("optimum.quanto")
    whole = nn.Sequential(layer).to(device)
    quanto.quantize(whole, weights=quanto.qint8)
    quanto.freeze(whole)
    return whole


def _hqq(layer: nn.Linear, device: torch.device) -> nn.Module:
    core: Any = import_module("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    return core.HQQLinear(layer, config, compute_dtype=torch.bfloat16, device=str(device))


QUANTISERS: Mapping[str, Callable[[nn.Linear, torch.device], nn.Module]] = {
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
    "optimum-quanto": _quanto,
    "hqq": _hqq,
}
"""Name of the distribution -> makes its layer from a linear one."""
