"""Optimisers that know of LoRA's two factors: any of PyTorch's, with other rates or gradients for A and B."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..methods.lora import LoRA, LoraConfig, loras
from ..model import PeftModel


def create_loraplus_optimizer(
    model: PeftModel,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **options: Any,
) -> Optimizer:
    """B learns `loraplus_lr_ratio` times as fast as A. LoRA+, Hayou et al. 2024, arXiv:2402.12354.

    In `model.param_groups` and for `coadapt train` the same is `loraplus_lr_ratio`, for each adapter by itself.

    Args:
        loraplus_weight_decay: of matrices; vectors (biases, DoRA's lengths) have none, and learn as fast as B.
        loraplus_lr_embedding: for factors at embeddings, whose input is not a vector of features.
        options: what `optimizer_cls` takes besides.

    Raises:
        ValueError: no LoRA trains.
    """
    ups = {id(m.B) for _, m in _loras(model)}
    embedded = {id(p) for embeds, m in _loras(model) if embeds for p in m.parameters()}
    if not ups:
        raise ValueError("create_loraplus_optimizer: no LoRA of this model trains.")
    fast, decay = lr * loraplus_lr_ratio, loraplus_weight_decay
    rates = {
        "rest": (lr, decay),
        "embedding": (loraplus_lr_embedding, decay),
        "B": (fast, decay),
        "vector": (fast, 0.0),
    }
    found: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for p in (p for p in model.parameters() if p.requires_grad):
        name = "embedding" if id(p) in embedded else "vector" if p.dim() == 1 else "B" if id(p) in ups else "rest"
        found[name].append(p)
    groups = [{"params": found[n], "lr": rate, "weight_decay": decay} for n, (rate, decay) in rates.items() if found[n]]
    return optimizer_cls(groups, lr=lr, **options)  # pyright: ignore[reportCallIssue]


def create_lorafa_optimizer(
    model: PeftModel, r: int, lora_alpha: float, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """A stays as it is; B gets the gradient whose change comes nearest to that of the whole weight. With AdamW.

    LoRA-FA, Zhang et al. 2023, arXiv:2308.03303: g_B (A Aᵀ)⁻¹ / s², the least-squares solution of s g_B A = g_W. A is
    frozen by this call; `unfreeze` trains it again.

    Args:
        r, lora_alpha, use_rslora: checks, of every LoRA that trains; what its layers have is found.

    Raises:
        ValueError: no LoRA trains, or one is of another rank or scale.
    """
    for name, adapter in model._names.items():
        config = adapter.config
        wanted = {"r": r, "lora_alpha": lora_alpha, **({} if use_rslora is None else {"use_rslora": use_rslora})}
        wrong = [f"{k}={getattr(config, k)!r}" for k, v in wanted.items() if getattr(config, k, v) != v]
        if isinstance(config, LoraConfig) and wrong and any(p.requires_grad for p in adapter.parameters()):
            raise ValueError(f"create_lorafa_optimizer: adapter {name!r} has {', '.join(wrong)}; say the same here.")
    methods = [m for _, m in _loras(model) if m.B.dim() == 2]

    def correct() -> None:
        for method in methods:
            if method.B.grad is not None:
                a = _wide(method.A).flatten(1)
                method.B.grad.copy_(_wide(method.B.grad) @ _inverse(a @ a.mT, 1e-8) / method.scale**2)

    for method in methods:
        method.A.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return _corrected(AdamW(trained, lr=lr, eps=1e-6, weight_decay=weight_decay), methods, correct)


def create_riemannian_optimizer(
    model: PeftModel, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **options: Any
) -> Optimizer:
    """A and B get gradients that do not depend on how their product is shared out among them.

    Riemannian Preconditioned LoRA, Zhang and Pilanci 2024, arXiv:2402.02347: (Bᵀ B + reg)⁻¹ g_A and g_B (A Aᵀ + reg)⁻¹.

    Args:
        reg: what is added to the diagonals before they are inverted.
        options: what `optimizer_cls` takes besides.

    Raises:
        ValueError: no LoRA trains; when it steps, a closure, which would make new gradients.
    """
    methods = [m for embeds, m in _loras(model) if not embeds and m.A.requires_grad and m.B.dim() == 2]

    def correct() -> None:
        for method in methods:
            a, b = _wide(method.A).flatten(1), _wide(method.B)
            if method.A.grad is not None:
                down = method.A.grad
                down.copy_((_inverse(b.mT @ b, reg) @ _wide(down).flatten(1)).view(down.shape))
            if method.B.grad is not None:
                method.B.grad.copy_(_wide(method.B.grad) @ _inverse(a @ a.mT, reg))

    trained = [p for p in model.parameters() if p.requires_grad]
    return _corrected(optimizer_cls(trained, lr=lr, **options), methods, correct)  # pyright: ignore[reportCallIssue]


def _loras(model: PeftModel) -> list[tuple[bool, LoRA]]:
    """Those that train, and whether each is at an embedding."""
    return [found for adapter in model._names.values() for found in loras(adapter)]


def _corrected(optimizer: Optimizer, methods: list[LoRA], correct: Callable[[], None]) -> Optimizer:
    if not methods:
        raise ValueError(
            "No LoRA of this model trains both of its factors at a layer, so no gradient would be changed."
        )

    @torch.no_grad()
    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(given is not None for given in (*args[1:], *kwargs.values())):
            raise ValueError("This optimiser changes gradients before it steps; a closure would make new ones.")
        correct()

    optimizer.register_step_pre_hook(before)
    return optimizer


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _inverse(matrix: Tensor, reg: float) -> Tensor:
    """(R, R); the pseudo-inverse, as B is zero at the start."""
    damped = matrix + reg * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.pinv(damped, hermitian=True)
