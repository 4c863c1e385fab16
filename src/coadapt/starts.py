"""What is done before an adapter trains that starts from data, or from a base that was not quantised yet.

EVA, CorDA, LoRA-GA and LoftQ, by the field's names.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .core.layer import Layer, kind_of
from .core.method import method_for
from .core.store import packed_store
from .formats.vocabulary import ROOT
from .inits import Site, gather, rank_and_scale
from .inits.corda import decomposed
from .inits.eva import Moments, shared_out
from .lora_options import CordaConfig, EvaConfig
from .methods.lora import LoRA, LoraConfig
from .model import PeftModel


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """What EVA finds in batches: path of a layer -> (R, I) its A at the start; layers that get none are left out.

    The inputs of each layer are those without adapters; padding, and tokens without a label, do not count where batches
    tell.

    Args:
        model: a base, or a view with an adapter to be started so.
        dataloader: batches, gone through once, or until directions do not change any more (`EvaConfig.tau`).
        peft_config: for a base, or in place of the adapter's own.
        forward_fn: (base, batch) -> anything; left out, the batch is a mapping of the base's arguments.

    Raises:
        ValueError: the configuration starts otherwise, or is missing, or there are no batches.
    """
    if peft_config is None:
        if not isinstance(model, PeftModel):
            raise ValueError("get_eva_state_dict: a model without adapters needs peft_config=.")
        peft_config = _evas(model, adapter_name)
    base = _base(model, peft_config, "eva")
    layers = _layers(base, peft_config)
    options = peft_config.eva_config or EvaConfig()
    assert isinstance(options, EvaConfig)
    ranks = {layer.path: rank_and_scale(peft_config, layer.path)[0] for layer in layers}
    most = {path: min(round(rank * options.rho), layer.shape[1]) for (path, rank), layer in zip(ranks.items(), layers)}  # noqa: B905
    found = _moments(base, layers, dataloader, options, most, forward_fn)
    directions = {path: moments.directions(most[path]) for path, moments in found.items()}
    counts = shared_out({path: shares for path, (_, shares, _) in directions.items()}, ranks)
    state: dict[str, Tensor] = {}
    for layer in layers:
        vectors, _, singular = directions[layer.path]
        if n := counts[layer.path]:
            vectors = vectors[:n] / singular[:n, None].sqrt() if options.whiten else vectors[:n]
            state[layer.path] = vectors.clone()
    return state


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    adapter_name: str = "default",
) -> None:
    """Starts an adapter with `init_lora_weights="eva"` from batches: A, and how many ranks each of its layers gets.

    Layers that get none are left out. To be called before the optimiser is made.

    Args:
        dataloader, forward_fn: as in `get_eva_state_dict`.
        eva_state_dict: what that gave, in place of batches.

    Raises:
        ValueError: the adapter is to start otherwise, there are no batches, or `eva_state_dict` is of other layers.
    """
    config = _evas(model, adapter_name)
    if (dataloader is None) == (eva_state_dict is None):
        raise ValueError("initialize_lora_eva_weights needs either a dataloader or an eva_state_dict.")
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(model, dataloader, None, forward_fn, adapter_name)
    state = {path.removeprefix(ROOT): vectors for path, vectors in eva_state_dict.items()}
    options = config.eva_config or EvaConfig()
    assert isinstance(options, EvaConfig)
    layers = {layer.path: layer for layer in _layers(model.base, config)}
    for path, vectors in state.items():
        if path not in layers or vectors.shape[1] != layers[path].shape[1]:
            raise ValueError(
                f"eva_state_dict has {tuple(vectors.shape)} for {path!r}, which fits no layer of this adapter."
            )
        gather(layers[path].module, "eva", vectors.to(layers[path].like().device).clone())
    alphas = {p: rank_and_scale(dataclasses.replace(config, use_rslora=False), p) for p in state}
    node = model.composition
    model.delete_adapter(adapter_name)
    model.add_adapter(
        adapter_name,
        dataclasses.replace(
            config,
            target_modules="|".join(map(re.escape, state)),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            rank_pattern={re.escape(p): len(vectors) for p, vectors in state.items()},
            alpha_pattern={
                re.escape(p): alphas[p][1] * (len(vectors) if options.adjust_scaling_factors else alphas[p][0])
                for p, vectors in state.items()
            },
        ),
    )
    model.set_adapter(node)


def _evas(model: PeftModel, adapter_name: str) -> LoraConfig:
    config = model.get_adapter(adapter_name).config
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise ValueError(f"Adapter {adapter_name!r} does not start by init_lora_weights='eva'.")
    return config


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """Starts a LoRA of a quantised base so that Q + s B A is near to W, which lies in safetensors files on the disk.

    One step of LoftQ (arXiv:2310.08659), whatever the quantiser; A and B are those of the best approximation of W - Q,
    divided by s = alpha / r, which peft leaves out.

    Args:
        model_path: the file, or the folder with one or several; left out, the folder that the base was loaded from.
        callback: (model, path of the layer) -> whether the layer keeps what it was just given.

    Raises:
        ValueError: the adapter sits at no quantised layer as a plain LoRA, or no file holds a layer's weight.
        FileNotFoundError: there are no such files.
    """
    at = {p.place.path: p for p in peft_model.get_adapter(adapter_name).parts}
    found = {path: p for path, p in at.items() if isinstance(p.method, LoRA) and packed_store(p.place.module)}
    if not found:
        raise ValueError(f"replace_lora_weights_loftq: {adapter_name!r} is no LoRA at a quantised layer.")
    files = _weight_files(model_path or getattr(peft_model.base, "name_or_path", ""))
    for path, part in found.items():
        lora, layer = part.method, Layer(part.place.module, path)
        assert isinstance(lora, LoRA)
        if (file := files.get(f"{path}.weight")) is None:
            raise ValueError(f"No weight of {path!r} is in {model_path}. There are {len(files)} others.")
        with safe_open(str(file), "pt") as tensors:
            whole = tensors.get_tensor(f"{path}.weight").to(lora.A.device)
        weight = layer.weight().float()
        if whole.shape != weight.shape:
            raise ValueError(f"{file} has {tuple(whole.shape)} for {path!r}, whose weight is {tuple(weight.shape)}.")
        apart = whole.float() - weight
        u, s, vh = torch.linalg.svd(apart, full_matrices=False)
        rank = min(len(lora.A), len(s))
        root = (s[:rank] / lora.scale).sqrt()
        before = lora.A.clone(), lora.B.clone()
        lora.A.zero_()[:rank] = root[:, None] * vh[:rank]
        lora.B.zero_()[:, :rank] = u[:, :rank] * root
        if callback is not None and not callback(peft_model, path):
            lora.A.copy_(before[0])
            lora.B.copy_(before[1])


def _weight_files(where: str | Path) -> dict[str, Path]:
    """Name of a tensor -> the file that holds it."""
    path = Path(where)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"There are no safetensors at {str(path)!r}; give model_path, the base that is not quantised."
        )
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(str(file), "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


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
