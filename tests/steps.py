"""Steps that many tests take: a loss, gradients, a view with one adapter alone, relative errors, traces."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from coadapt import PeftModel, get_peft_model
from models import logits


def loss(model: Any, tokens: Tensor | None = None, **options: Any) -> Tensor:
    """A scalar that every logit takes part in."""
    return logits(model, tokens, **options).square().mean()


def gradients(view: PeftModel, name: str) -> Tensor:
    """The gradients of one adapter as one vector. A parameter without one makes the test fail."""
    found = {n: p.grad for n, p in view.get_adapter(name).named_parameters()}
    assert found and None not in found.values(), [n for n, g in found.items() if g is None]
    return flat(g for g in found.values() if g is not None).clone()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All values of some tensors as one vector."""
    return nn.utils.parameters_to_vector(tensors).detach()


def alone(make: Callable[..., Any], view: PeftModel, name: str) -> PeftModel:
    """A view of a new base that holds nothing but a copy of one adapter of `view`."""
    single = get_peft_model(make(), view.peft_config[name], adapter_name=name)
    single.get_adapter(name).load_state_dict(view.get_adapter(name).state_dict())
    return single.train(view.training)


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, and infinity where there is nothing to compare with."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    a, b = found.detach().double(), expected.detach().double()
    return float((a - b).norm() / b.norm()) if b.norm() > 0 else float("inf")


def checkpointing(model: Any, use_reentrant: bool) -> None:
    """Turns checkpointing on, by the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def no_checkpointing(model: Any) -> None:
    """Turns it off again."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()


def traces(base: nn.Module) -> list[Any]:
    """What attaching would change of a base: classes, keys, weights, what trains, hooks, the configuration."""
    return [
        [
            (n, type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in base.named_modules()
        ],
        [(n, p.requires_grad, p.data_ptr(), float(p.detach().double().sum())) for n, p in base.named_parameters()],
        str(getattr(base, "config", "")),
    ]
