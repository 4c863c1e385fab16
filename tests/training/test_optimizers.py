"""Optimisers that treat LoRA's factors apart: against peft's, and against the papers' formulas the slow way."""

from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from torch import Tensor, nn

import coadapt
from coadapt import (
    LoraConfig,
    PeftModel,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from coadapt.training.monitor import Monitor
from coadapt.training.trainer import Rates
from formats.field import far, field_quietly
from models import MODELS, ids, logits

OPTIONS = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, "target_modules": "all-linear"}


def view() -> PeftModel:
    torch.manual_seed(0)
    return coadapt.get_peft_model(MODELS["llama"](), LoraConfig(**OPTIONS)).train()


def field_like(ours: PeftModel) -> Any:
    model = field_quietly(
        lambda: peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(**OPTIONS, task_type="CAUSAL_LM"))
    )
    with torch.no_grad():
        for part in ours.get_adapter("default").parts:
            layer: Any = model.base_model.model.get_submodule(part.place.path)
            layer.lora_A["default"].weight.copy_(part.method.A)  # type: ignore[arg-type]
            layer.lora_B["default"].weight.copy_(part.method.B)  # type: ignore[arg-type]
    return model.train()


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_loraplus_is_the_fields() -> None:
    ours = view()
    field = field_like(ours)
    options: dict[str, Any] = {"lr": 1e-2, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    one = create_loraplus_optimizer(ours, torch.optim.AdamW, **options)
    other = field_quietly(lambda: peft.optimizers.create_loraplus_optimizer(field, torch.optim.AdamW, **options))
    for _ in range(3):
        step(ours, one)
        step(field, other)
    assert far(logits(ours.eval()), logits(field.eval())) < 1e-4
    rates = {g["lr"]: sum(p.numel() for p in g["params"]) for g in one.param_groups}
    assert rates == {g["lr"]: n for g in other.param_groups if (n := sum(p.numel() for p in g["params"]))}


def test_loraplus_in_param_groups() -> None:
    ours = view()
    slow, fast = ours.param_groups({"default": {"lr": 1e-3, "loraplus_lr_ratio": 4}})
    assert (slow["lr"], fast["lr"], slow["name"], fast["name"]) == (1e-3, 4e-3, "default", "default")
    assert {p.shape[0] for p in slow["params"]} == {4}
    assert {p.shape[1] for p in fast["params"]} == {4}
    assert ours.get_adapter("default").learning_rate == 1e-3
    group = Rates(learning_rate=1e-3, loraplus_lr_ratio=4, max_grad_norm=1.0).group()
    optimizer = torch.optim.AdamW(ours.param_groups({"default": group}))
    ours(input_ids=ids(), labels=ids()).loss.backward()
    monitor = Monitor(ours)
    norm = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None]).norm()
    monitor.before_step(optimizer.param_groups, 1, measure=True)
    clipped = torch.cat([p.grad.flatten() for p in ours.parameters() if p.grad is not None]).norm()
    assert float(clipped) == pytest.approx(min(float(norm), 1.0), rel=1e-4), "A and B are clipped together"
    optimizer.step()
    monitor.after_step(optimizer.param_groups)
    assert monitor.figures["default"]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    ours.add_adapter("prompt", coadapt.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="needs a LoRA"):
        ours.param_groups({"prompt": {"lr": 1e-3, "loraplus_lr_ratio": 4}})


def test_riemannian_is_the_fields() -> None:
    ours = view()
    field = field_like(ours)
    one = create_riemannian_optimizer(ours, torch.optim.SGD, lr=0.05, reg=1e-2)
    other = peft.optimizers.create_riemannian_optimizer(field, torch.optim.SGD, lr=0.05, reg=1e-2)
    for _ in range(3):
        step(ours, one)
        step(field, other)
    assert far(logits(ours.eval()), logits(field.eval())) < 1e-5
    with pytest.raises(ValueError, match="closure"):
        one.step(lambda: 0.0)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_lorafa_comes_nearest_to_the_gradient_of_the_weight() -> None:
    """min over G of |s G A - dL/dW|, solved by least squares."""
    torch.manual_seed(0)
    base = Holder()
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["layer"])
    ours = coadapt.get_peft_model(base, config).train()
    method: Any = ours.get_adapter("default").parts[0].method
    optimizer = create_lorafa_optimizer(ours, r=2, lora_alpha=6, lr=1e-3)
    assert not method.A.requires_grad
    x, chosen = torch.randn(7, 6), torch.randn(7, 5)
    (ours(x) * chosen).sum().backward()
    whole = chosen.mT @ x  # dL/dW
    expected = torch.linalg.lstsq(method.scale * method.A.detach().mT, whole.mT).solution.mT
    kept = method.B.detach().clone()
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(method.B.grad.clone()))
    optimizer.step()
    assert far(seen[0], expected) < 1e-4
    assert far(method.B, kept - 1e-3 * expected.sign()) < 1e-6, "Adam's first step"
    with pytest.raises(ValueError, match=r"'default' has r=2; say the same"):
        create_lorafa_optimizer(ours, r=3, lora_alpha=6, lr=1e-3)


def test_without_a_lora_they_say_so() -> None:
    ours = coadapt.get_peft_model(MODELS["llama"](), coadapt.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="no LoRA"):
        create_loraplus_optimizer(ours, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=2)
    with pytest.raises(ValueError, match="No LoRA"):
        create_riemannian_optimizer(ours, torch.optim.SGD, lr=1e-3)
