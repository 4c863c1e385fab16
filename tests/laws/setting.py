"""What the laws share: which method on which model, views made ready, and comparisons."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from cases import CASES, VARIANTS
from coadapt import PeftModel
from coadapt.config import PeftConfig, TargetedConfig
from coadapt.core.method import METHODS, WeightMethod
from coadapt.methods.bottleneck import Bottleneck
from coadapt.methods.lily import Lily
from models import FAMILIES, MODELS, conv, ids, logits, plain, stir

EVERY: dict[str, PeftConfig] = {**CASES, **VARIANTS}
MAKE = {**MODELS, **FAMILIES, "plain": plain, "conv": conv}
OF_TRANSFORMERS = ("shadow", "reft", "adaption", "prompt", "p-tuning", "prefix", "invertible", "language")
"""Methods of these cases need a transformers model."""

CAUSAL = ("llama", "gpt2", "bloom", "opt", "gemma2", "gemma3", "qwen2", "qwen3", "mixtral")

WITHOUT_BIAS: dict[str, list[str]] = {
    **{model: ["q_proj", "down_proj"] for model in ("llama", "gemma2", "gemma3", "qwen3")},
    "mixtral": ["q_proj", "o_proj"],
    "t5": ["q", "wo"],
}
"""Where nothing has a bias yet, BitFit needs to be told which layers get one."""

_ENDS = {
    "plain": (["first", "second", "conv"], ["second"]),
    "conv": (["first", "second", "hidden"], ["hidden"]),
}
"""Targets in what is none of transformers' models, of methods that take convolutions and of those that do not."""

DIVIDES = {"gralora": "gralora_k", "vblora": "vector_length"}
"""Cases with an option that must divide the sizes of all layers."""

LINEAR = ("bd-lora", "qa-lora", "velora")
"""Methods of these cases adapt nothing but linear layers."""

ONLY_IN_TRAINING = ("monteclora.v", "monteclora.c")
"""Parameters that have no part in evaluation."""

few = settings(max_examples=12, deadline=None, derandomize=True)


def fits(case: str, model: str) -> bool:
    """Whether a method has a place in a model (BLOOM's attention takes no prefix; a plain module has no input)."""
    if case in ("lora-bias", "glora-bias") and model in WITHOUT_BIAS:
        return False  # there is no bias
    if case.endswith("tokens") and model in ("vit", "conv"):
        return False  # there are none
    if case == "lora-tokens" and model == "plain":
        return False  # nothing says which module embeds
    if case == "c3a" and model == "conv":
        return False  # 27 inputs and 8 outputs
    if case == "glora-vectors" and model in ("gpt2", "bloom", "bert", "opt", "bart", "whisper", "vit"):
        return False  # what comes out of a LayerNorm adds up to nothing, and so does B's gradient
    if case in ("bat", "boft-butterfly", "oft-blocks") and model == "conv":
        return False  # 27 features, which are no blocks of two
    if case == "a-lora" and model in ("t5", "bert", "bart", "whisper", "vit", "plain", "conv"):
        return False  # a causal language model's
    if case.endswith("-stream"):
        return model in ("llama", "gpt2", "bloom", "t5", "bert", "vit", "qwen2", "qwen3")  # whose norms' order is told
    if case == "lora-tied":
        return model in ("gpt2", "t5", "opt", "bart", "gemma2")
    if case.endswith("-experts"):
        return model == "mixtral"
    if case.endswith("all-linear") and model == "mixtral":
        return False  # says in a warning what it leaves out: tests/test_coverage.py
    if model in ("plain", "conv"):
        return not case.startswith(OF_TRANSFORMERS) and not (model == "conv" and case == "ln-tuning")
    if case == "reft-direct":
        return model in ("bert", "vit")  # elsewhere last tokens move: tests/methods/test_reft.py
    if case == "prompt-cpt" or case.startswith("shadow"):
        return model in CAUSAL
    embedded = case.startswith(("prompt", "p-tuning", "invertible", "language"))
    return not (model == "bloom" and case.startswith(("prefix", "adaption"))) and not (model == "vit" and embedded)


def config_of(case: str, model: str) -> PeftConfig:
    """The case's configuration, with targets where the model is none of transformers'."""
    config = EVERY[case]
    if case == "bitfit" and model in WITHOUT_BIAS:
        return replace(config, target_modules=WITHOUT_BIAS[model])
    if model == "plain" and case == "tokens":
        return replace(config, target_modules=["embed"])
    if case == "bd-lora":
        name = {"gpt2": "attn", "plain": "second", "conv": "hidden"}.get(model, "v")
        config = replace(config, use_bdlora={"target_modules_bd_a": [name], "nblocks": 2, "match_strict": False})
    if model in _ENDS and case in LINEAR:
        return replace(config, target_modules=["second"] if model == "plain" else ["hidden"])
    usual = isinstance(config, TargetedConfig) and config.target_modules is None and case != "ln-tuning"
    if model in _ENDS and usual:
        even = ["second", "hidden"] if model == "conv" and case in DIVIDES else _ENDS[model][not _convolves(config)]
        return replace(config, target_modules=even)
    return config


def _convolves(config: PeftConfig) -> bool:
    """Whether its method takes convolutions."""
    method = METHODS[config.method]
    return "conv" in method.kinds if issubclass(method, WeightMethod) else not issubclass(method, Bottleneck | Lily)


def pairs(turn: int, cases: Iterable[str] = tuple(EVERY), models: Sequence[str] = tuple(MAKE)) -> Any:
    """Parametrizes a law over (case, model): each case on one model, which one says `turn`; the rest is `full`."""
    out: list[Any] = []
    for i, case in enumerate(cases):
        able = [m for m in models if fits(case, m)]
        for j, model in enumerate(able):
            chosen = j == (i + turn) % len(able)
            out.append(pytest.param(case, model, marks=() if chosen else pytest.mark.full))
    return pytest.mark.parametrize(("case", "model"), out)


def rest(*models: str) -> list[Any]:
    """Further models for a law, in the full run only."""
    return [pytest.param(model, marks=pytest.mark.full) for model in models]


def attach(base: nn.Module, model: str, *cases: str, by: float = 0.1) -> PeftModel:
    """A view with one adapter a case, named a, b, c ...; none is at its start, and all of them are active, summed."""
    view = PeftModel(base)
    for i, case in enumerate(cases):
        torch.manual_seed(i)
        name = "abcdefgh"[i]
        view.add_adapter(name, config_of(case, model))
        stir(view.get_adapter(name), seed=i, by=by)
    view.set_adapter(["abcdefgh"[i] for i in range(len(cases))])
    return view


def view_on(model: str, *cases: str, by: float = 0.1) -> PeftModel:
    """`attach` on a new base."""
    return attach(MAKE[model](), model, *cases, by=by)


def close(one: Tensor, other: Tensor, within: float = 1e-6) -> None:
    """Equal to rounding: relative to the largest value (whatever its sign)."""
    assert one.shape == other.shape
    torch.testing.assert_close(one, other, rtol=within, atol=within * max(1.0, float(other.detach().abs().max())))


def far(one: Tensor, other: Tensor) -> None:
    """Not equal, by more than rounding: what makes a comparison worth something."""
    assert float((one - other).detach().abs().max()) > 1e-5


def gradients(view: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the gradients of everything that trains, which are cleared."""
    trained = {n: p for n, p in view.named_parameters() if p.requires_grad}
    idle = [n for n, p in trained.items() if p.grad is None and n.endswith(ONLY_IN_TRAINING)]
    out = {n: None if p.grad is None else p.grad.clone() for n, p in trained.items() if n not in idle}
    view.zero_grad(set_to_none=True)
    return out


def same_gradients(one: dict[str, Tensor | None], other: dict[str, Tensor | None], within: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, gradient in one.items():
        theirs = other[name]
        assert (gradient is None) == (theirs is None), name
        if gradient is not None and theirs is not None:
            torch.testing.assert_close(
                gradient,
                theirs,
                rtol=within,
                atol=within * max(2e-2, float(theirs.abs().max())),  # sums may cancel (the biases of keys)
                msg=lambda m, n=name: f"{n}: {m}",
            )


def loss(view: Any, tokens: Tensor | None = None, **options: Any) -> Tensor:
    """A scalar that every output has a share in."""
    out = logits(view, tokens, **options).float()
    return (out * torch.linspace(-1, 1, out.shape[-1])).pow(2).sum() / len(out)


def recompute(model: Any, reentrant: bool) -> None:
    """Turns gradient checkpointing on, by the name that this version of transformers has for it."""
    name = "activation_checkpointing_enable"
    if hasattr(model, name):
        getattr(model, name)({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


__all__ = [
    "DIVIDES", "EVERY", "MAKE", "ONLY_IN_TRAINING", "WITHOUT_BIAS", "attach", "close", "config_of", "far", "few",
    "fits", "gradients", "ids", "logits", "loss", "pairs", "recompute", "rest", "same_gradients", "stir", "view_on",
]  # fmt: skip
