"""What has to be done before an adapter trains that starts from data: EVA, CorDA and LoRA-GA, by the field's names."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .core.layer import Layer, kind_of
from .core.method import method_for
from .inits import Site, gather, rank_and_scale
from .inits.corda import decomposed
from .inits.eva import Moments, shared_out
from .lora_options import CordaConfig, EvaConfig
from .methods.lora import LoraConfig
from .model import PeftModel


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Starts an adapter with `init_lora_weights="eva"` from batches: A, and how many ranks each of its layers gets.

    Layers that get none are left out. To be called before the optimiser is made. The inputs of each layer are those
    without adapters; padding, and tokens without a label, do not count where batches tell.

    Args:
        dataloader: batches, gone through once, or until directions do not change any more (`EvaConfig.tau`).
        forward_fn: (base, batch) -> anything; left out, the batch is a mapping of the base's arguments.

    Raises:
        ValueError: the adapter is to start otherwise, or there are no batches.
    """
    config = model.get_adapter(adapter_name).config
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise ValueError(f"Adapter {adapter_name!r} does not start by init_lora_weights='eva'.")
    options = config.eva_config or EvaConfig()
    assert isinstance(options, EvaConfig)
    layers = _layers(model.base, config)
    ranks = {layer.path: rank_and_scale(config, layer.path)[0] for layer in layers}
    most = {path: min(round(rank * options.rho), layer.shape[1]) for (path, rank), layer in zip(ranks.items(), layers)}  # noqa: B905
    found = _moments(model.base, layers, dataloader, options, most, forward_fn)
    directions = {path: moments.directions(most[path]) for path, moments in found.items()}
    counts = shared_out({path: shares for path, (_, shares, _) in directions.items()}, ranks)
    for layer in layers:
        vectors, _, singular = directions[layer.path]
        n = counts[layer.path]
        vectors = vectors[:n] / singular[:n, None].sqrt() if options.whiten else vectors[:n]
        gather(layer.module, "eva", vectors.clone())
    alphas = {p: rank_and_scale(dataclasses.replace(config, use_rslora=False), p) for p in counts}
    kept = {p: n for p, n in counts.items() if n}
    node = model.composition
    model.delete_adapter(adapter_name)
    model.add_adapter(
        adapter_name,
        dataclasses.replace(
            config,
            target_modules="|".join(map(re.escape, kept)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern={re.escape(p): n for p, n in kept.items()},
            alpha_pattern={
                re.escape(p): alphas[p][1] * (n if options.adjust_scaling_factors else alphas[p][0])
                for p, n in kept.items()
            },
        ),
    )
    model.set_adapter(node)


@torch.no_grad()
def preprocess_corda(model: nn.Module, lora_config: LoraConfig, run_model: Callable[[], Any]) -> None:
    """To be called before an adapter with `init_lora_weights="corda"` is attached to `model`.

    Args:
        run_model: calls `model` on what the adapter is to be started from.

    Raises:
        ValueError: the configuration starts otherwise, or a layer was not called.
    """
    base = _base(model, lora_config, "corda")
    options = lora_config.corda_config or CordaConfig()
    assert isinstance(options, CordaConfig)
    layers = _layers(base, lora_config)
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def note(path: str, x: Tensor) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        flat = flat / flat.max().abs()
        sums[path] = sums.get(path, 0) + flat.mT @ flat
        calls[path] = calls.get(path, 0) + 1

    with _hooked(layers, note), _evaluating(base):
        run_model()
    for layer in layers:
        rank, _ = rank_and_scale(lora_config, layer.path)
        site = Site(layer, rank, 1.0)
        site.within_rank("corda")
        _called(layer.path, sums)
        found = decomposed(site.weight(), sums[layer.path] / calls[layer.path], rank, options.corda_method)
        gather(layer.module, "corda", found)


def preprocess_loraga(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any]) -> None:
    """To be called before an adapter with `init_lora_weights="lora_ga"` is attached to `model`.

    Args:
        train_step: calls `model` and `backward()`, once or more; the weights' gradients are averaged over those.

    Raises:
        ValueError: the configuration starts otherwise, or a layer got no gradient.
    """
    base = _base(model, lora_config, "lora_ga")
    layers = _layers(base, lora_config)
    before = {p: (p.requires_grad, p.grad) for p in base.parameters()}
    calls: dict[str, int] = {}
    own = {layer.path: layer.module.get_parameter("weight") for layer in layers}
    if coarse := [path for path, weight in own.items() if not weight.is_floating_point()]:
        raise ValueError(f"LoRA-GA needs the gradient of {coarse[0]!r}, whose weight is quantised and has none.")
    training, hooks = base.training, list[Any]()
    try:
        base.requires_grad_(False)
        for path, weight in own.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_hook(lambda _, path=path: calls.update({path: calls.get(path, 0) + 1})))
        for p in before:
            p.grad = None
        base.train()
        with torch.enable_grad():
            train_step()
        for layer in layers:
            _called(layer.path, calls)
            gradient = own[layer.path].grad
            assert gradient is not None
            gather(layer.module, "lora_ga", layer.kind.canonical(gradient / calls[layer.path]).clone())
    finally:
        base.train(training)
        for hook in hooks:
            hook.remove()
        for p, (trained, gradient) in before.items():
            p.requires_grad_(trained)
            p.grad = gradient


def _base(model: nn.Module, config: LoraConfig, start: str) -> nn.Module:
    if config.init_lora_weights != start:
        raise ValueError(f"This LoraConfig has init_lora_weights={config.init_lora_weights!r}, not {start!r}.")
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _layers(base: nn.Module, config: LoraConfig) -> list[Layer]:
    """The linear layers that an adapter will sit at. Raises ValueError where there are others."""
    places = method_for(config).places(config, base)
    for place in places:
        kind = kind_of(place.module)
        if place.parameter or kind is None or kind.name != "linear":
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} looks at the inputs of linear layers; {place.path!r} "
                "is none. Leave it out."
            )
    return [Layer(place.module, place.path) for place in places]


def _called(path: str, seen: Mapping[str, Any]) -> None:
    if path not in seen:
        raise ValueError(f"{path!r} was not called, so there is nothing to start it from.")


@contextmanager
def _hooked(layers: Iterable[Layer], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    def at(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: note(path, args[0])

    hooks = [layer.module.register_forward_pre_hook(at(layer.path)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(base: nn.Module) -> Iterator[None]:
    training = base.training
    base.eval()
    try:
        yield
    finally:
        base.train(training)


def _moments(
    base: nn.Module,
    layers: list[Layer],
    batches: Iterable[Any],
    options: EvaConfig,
    most: Mapping[str, int],
    forward_fn: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, Moments]:
    """Of the inputs of each layer; those that are given the same have them in common."""
    found: dict[str, Moments] = {}
    counted: Tensor | None = None
    given: list[tuple[Tensor, Moments]] = []
    before: dict[int, Tensor] = {}

    def note(path: str, x: Tensor) -> None:
        same = next((m for other, m in given if other is x), None)
        moments = found.setdefault(path, same or Moments())
        if same is None or moments is not same:
            rows = x[counted] if counted is not None and x.shape[:-1] == counted.shape else x.reshape(-1, x.shape[-1])
            moments.add(rows)
            given.append((x, moments))

    n = 0
    with _hooked(layers, note), _evaluating(base):
        for n, batch in enumerate(batches, 1):
            given.clear()
            counted = _counted(batch, options)
            forward_fn(base, batch) if forward_fn is not None else base(**batch)
            if n & (n - 1) == 0 and _settled(found, most, before, options.tau):
                break
    given.clear()
    if not n:
        raise ValueError("initialize_lora_eva_weights: the dataloader has no batches.")
    for layer in layers:
        _called(layer.path, found)
    return found


def _settled(found: Mapping[str, Moments], most: Mapping[str, int], before: dict[int, Tensor], tau: float) -> bool:
    """Whether all directions are those of when half as many batches had been seen."""
    alike = bool(before)
    ranks: dict[int, int] = {}
    for path, moments in found.items():
        ranks[id(moments)] = max(most[path], ranks.get(id(moments), 0))
    for moments in {id(m): m for m in found.values()}.values():
        now, _, _ = moments.directions(ranks[id(moments)])
        last = before.get(id(moments))
        alike &= last is not None and bool(((now * last).sum(-1).abs() >= tau).all())
        before[id(moments)] = now
    return alike


def _counted(batch: Any, options: EvaConfig) -> Tensor | None:
    """(B, T) which tokens count; None: all."""
    if not isinstance(batch, Mapping):
        return None
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    counted = None if mask is None else mask.bool()
    if options.use_label_mask and labels is not None:
        known = labels != options.label_mask_value
        counted = known if counted is None else counted & known
    return counted
