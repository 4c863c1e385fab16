"""What is in an adapter folder, and what is in a model, without loading weights."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from torch import nn

from coadapt.config import PeftConfig
from coadapt.core import bypass, coverage, parts
from coadapt.core.adapter import attribute
from coadapt.core.composition import Node
from coadapt.formats import checkpoint
from coadapt.formats.checkpoint import EXTRA
from coadapt.formats.compositions import node_from_json
from coadapt.formats.facts import places
from coadapt.formats.files import CHECKPOINT, COMPOSITION, CONFIG, WEIGHTS, read_json, settle
from coadapt.training.assemble import load_config, task_of_model
from coadapt.training.folder import AUTO_NAMES
from coadapt.training.load import base_of

Shape = tuple[int, ...]
PREFIX = "base_model.model."
MOST = 6
"""Places that are named for one method."""


@dataclass(kw_only=True)
class Site:
    """Alike places: the same name but for the layers' numbers, the same shapes."""

    name: str
    parameters: dict[str, Shape]
    count: int = 1

    @property
    def numbers(self) -> int:
        """How many numbers they hold together."""
        return self.count * sum(math.prod(shape) for shape in self.parameters.values())


@dataclass(frozen=True, kw_only=True)
class Found:
    """An adapter in a folder."""

    name: str
    config: PeftConfig
    sites: list[Site]
    size: int
    """Bytes of its weights on disk."""
    numbers: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", sum(site.numbers for site in self.sites))


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder holds."""

    adapters: list[Found]
    composition: str
    base: str | None


def read_folder(folder: Path) -> Contents:
    """An adapter's folder, a composition's, or a Trainer's checkpoint of a view.

    Raises:
        FileNotFoundError: it is none of these.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    settle(folder)
    if found := places(folder):
        adapters = [_read(place, "default" if place == folder else place.name) for place in found]
        told = read_json(folder / COMPOSITION) if (folder / COMPOSITION).is_file() else None
        node = node_from_json(told["composition"]) if told else adapters[0].name
        return Contents(adapters=adapters, composition=_text(node), base=base_of(folder))
    if (folder / CHECKPOINT).is_file():
        return _read_checkpoint(folder / CHECKPOINT)
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} is missing (found: {there}).")


def _read(place: Path, name: str) -> Found:
    file = place / WEIGHTS
    found = sites(_parted(key.removeprefix(PREFIX), shape) for key, shape in _shapes_in(file).items())
    return Found(name=name, config=PeftConfig.from_pretrained(place), sites=found, size=file.stat().st_size)


def _read_checkpoint(file: Path) -> Contents:
    with safe_open(str(file), "pt") as tensors:
        if EXTRA not in tensors.keys():
            raise FileNotFoundError(f"{file} holds a model, and no adapter.")
        said = checkpoint.read(tensors.get_tensor(EXTRA))
    shapes, adapters = _shapes_in(file), list[Found]()
    for name, values in said["adapters"].items():
        start = f"adapters.{attribute(name)}."
        own = {key.removeprefix(start): shape for key, shape in shapes.items() if key.startswith(start)}
        size = 4 * sum(math.prod(shape) for shape in own.values())
        found = sites(_parted_state(key, shape) for key, shape in own.items())
        adapters.append(Found(name=name, config=PeftConfig.from_dict(values), sites=found, size=size))
    base = next((a.config.base_model_name_or_path for a in adapters), None)
    return Contents(adapters=adapters, composition=_text(node_from_json(said["composition"])), base=base)


def _shapes_in(file: Path) -> dict[str, Shape]:
    with safe_open(str(file), "pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}


def _text(node: Node) -> str:
    return node if isinstance(node, str) else repr(node)


def sites(tensors: Iterable[tuple[str, str, Shape]]) -> list[Site]:
    """Tensors (module, parameter, shape) as sites: those of one module together, alike modules counted."""
    modules: dict[str, dict[str, Shape]] = {}
    for module, parameter, shape in tensors:
        modules.setdefault(module, {})[parameter] = shape
    return _alike(modules.items())


def _parted(key: str, shape: Shape) -> tuple[str, str, Shape]:
    """The key of a folder: `layers.0.q_proj.lora_A.weight` -> `layers.0.q_proj`, `lora_A`."""
    parts = key.split(".")
    tail = 2 if len(parts) > 2 and parts[-1] == "weight" and "lora" in parts[-2] else 1
    return ".".join(parts[:-tail]), parts[-tail], shape


def _parted_state(key: str, shape: Shape) -> tuple[str, str, Shape]:
    """The key of a checkpoint: `sites.layers/0/q_proj/lora.A` -> `layers.0.q_proj`, `A`."""
    group, site, *rest = key.split(".")
    module = site.rpartition("/")[0].replace("/", ".")
    return (module, ".".join(rest), shape) if group == "sites" else (group, site, shape)


def _alike(modules: Iterable[tuple[str, dict[str, Shape]]]) -> list[Site]:
    found: dict[tuple[str, str], Site] = {}
    for module, parameters in modules:
        name = _numberless(module)
        key = (name, str(sorted(parameters.items())))
        if key in found:
            found[key].count += 1
        else:
            found[key] = Site(name=name, parameters=parameters)
    return list(found.values())


def outline(model: str) -> nn.Module:
    """A model with its modules and shapes, and no weights."""
    config = load_config(model)
    named = [cls for name in config.architectures or [] if (cls := getattr(transformers, name, None)) is not None]
    auto = getattr(transformers, AUTO_NAMES[task_of_model(config) or "causal-lm"])
    with torch.device("meta"):
        return named[0](config) if named else auto.from_config(config)


def layers_table(model: nn.Module) -> Table:
    """The modules with parameters of their own, alike ones in one row."""
    kinds: dict[str, str] = {}
    modules: list[tuple[str, dict[str, Shape]]] = []
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            weight = own.get("weight", next(iter(own.values())))
            first = seen.setdefault(id(weight), name)
            if first != name:
                modules.append((name, {}))
                kinds[name] = f"{type(module).__name__}, tied to {first}"
                continue
            modules.append((name, {key: tuple(value.shape) for key, value in own.items()}))
            kinds[_numberless(name)] = type(module).__name__
    total = sum(p.numel() for p in model.parameters())
    table = Table(
        title=f"{type(model).__name__} · {total:,} parameters", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("layers", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("kind", overflow="fold")
    table.add_column("shapes", overflow="fold")
    table.add_column("parameters", justify="right")
    for site in _alike(modules):
        table.add_row(site.name, str(site.count), kinds[site.name], _shapes(site.parameters), f"{site.numbers:,}")
    return table


def coverage_tables(model: nn.Module) -> Iterable[Table | Text]:
    """What was found in a model, by role; then each method's own places, or why it has none."""
    found = Table(title="by role", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("role", "count", "for example", ""):
        found.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
    for role in coverage.roles(model):
        found.add_row(role.name, str(len(role.paths)), role.paths[0] if role.paths else "", role.note)
    yield Text("")
    yield found
    table = Table(title="by method", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("method", "places", "where, if no target is named"):
        table.add_column(name, justify="right" if name == "places" else "left", overflow="fold")
    for fit in sorted(coverage.fits(model), key=lambda fit: fit.method):
        places = list(dict.fromkeys(_numberless(path) for path in fit.paths))
        more = [f"{len(places) - MOST} more"] if len(places) > MOST else []
        where = ", ".join([*places[:MOST], *more]) or fit.why
        table.add_row(fit.method.lower(), str(len(fit.paths)) if fit.paths else "none", where)
    yield Text("")
    yield table


def targets_tables(model: nn.Module) -> Iterable[Table | Text]:
    """The words that name parts of a model with what each means in it, and what cannot be adapted."""
    table = Table(
        title=f"target_modules of {type(model).__name__}", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for name in ("word", "places", "parameters", "what it means here"):
        table.add_column(name, justify="right" if name in ("places", "parameters") else "left", overflow="fold")
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}
    total = sum(p.numel() for p in model.parameters())
    for word in parts.WORDS:
        try:
            layers, raw = parts.named(model, word)
        except ValueError:
            table.add_row(word, "none", "", "")
            continue
        held = sum(sizes.get(f"{path}.weight", 0) for path in layers) + sum(sizes[path] for path in raw)
        names = dict.fromkeys(_numberless(path) for path in (*layers, *raw))
        table.add_row(word, str(len(layers) + len(raw)), f"{held / total:.1%}", "\n".join(names))
    yield table
    if skipped := bypass.bypassed(model):
        yield Text("")
        never = Table(title="no targets", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        never.add_column("module", overflow="fold")
        never.add_column("why an adapter there would not run", overflow="fold")
        for path, why in {_numberless(path): why for path, why in skipped.items()}.items():
            never.add_row(path, why)
        yield never


def _numberless(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def folder_tables(folder: Path, model: str | None) -> Iterable[Table | Text]:
    """The base, the share of it that was trained, and what is active; then each adapter's method, size and sites."""
    found = read_folder(folder)
    name = model or found.base
    numbers = sum(a.numbers for a in found.adapters)
    try:
        total = sum(p.numel() for p in outline(name).parameters()) if name else 0
    except ValueError:
        if model is not None:
            raise
        total = 0  # the base that the folder names is not here
    share = f", {numbers / total:.2%} of the base's {total:,}" if total else ""
    yield Text(f"base         {name or 'not named'}\nparameters   {numbers:,}{share}\ncomposition  {found.composition}")
    for adapter in found.adapters:
        yield Text("")
        yield _adapter_table(adapter)


def _adapter_table(adapter: Found) -> Table:
    method = str(adapter.config.peft_type).lower()
    title = f"{adapter.name} · {method} · {adapter.numbers:,} parameters · {adapter.size / 1e3:,.0f} kB"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("sites", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("shapes", overflow="fold")
    table.add_column("parameters", justify="right")
    for site in adapter.sites:
        table.add_row(site.name or "the input", str(site.count), _shapes(site.parameters), f"{site.numbers:,}")
    return table


def _shapes(parameters: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in parameters.items())
