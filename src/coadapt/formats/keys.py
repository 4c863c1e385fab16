"""How an adapter's parameters are called in files: the field's names where it has some, ours where it has none."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import Adapter, ModuleCopy, Part
from ..core.layer import kind_of
from ..methods.lora import LoRA
from ..methods.prefix import Blocks, PrefixTuning, PrefixTuningConfig
from ..methods.prompt import PromptTuning

ROOT = "base_model.model."
"""Before every module path, as the field writes it."""
PROMPT = "prompt_embeddings"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its key, and how it comes from and goes into the adapter."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def entries(adapter: Adapter) -> Iterator[Entry]:
    """What a file for inference holds of `adapter`.

    Keys are built from the paths of the adapter's places, never found by looking into other keys.
    """
    prompts = {p.place.role: p.method for p in adapter.parts if isinstance(p.method, PromptTuning)}
    if prompts:
        yield _prompt(adapter, prompts)  # type: ignore[arg-type]
    if isinstance(adapter.shared, Blocks):
        blocks = adapter.shared.P
        yield Entry(PROMPT, tuple(blocks.shape), blocks.detach, lambda t: _copy(t, blocks))
    elif one_tensor_prefix(adapter):
        yield _prefix(adapter)
    for part in adapter.parts:
        prefix = isinstance(part.method, PrefixTuning) and (one_tensor_prefix(adapter) or isinstance(adapter.shared, Blocks))
        if prefix or isinstance(part.method, PromptTuning):
            continue
        yield from _plain(part)


def _plain(part: Part) -> Iterator[Entry]:
    method, path = part.method, part.place.path
    if isinstance(method, PrefixTuning) and method.projection is not None:
        yield Entry(f"{ROOT}{path}.P", method.shape, lambda: _projected(method), _came_otherwise)
    for name, value in method.state_dict(keep_vars=True).items():
        key, shape = _name(part, name), tuple(value.shape)
        if isinstance(method, LoRA) and name == "B" and (kind := kind_of(part.place.module)) and kind.name == "conv":
            shape = (*shape, *[1] * (part.place.module.get_parameter("weight").dim() - 2))
        yield Entry(key, shape, lambda v=value, s=shape: v.detach().reshape(s), lambda t, v=value: _copy(t, v))


def _name(part: Part, name: str) -> str:
    path = ROOT + (part.place.path + "." if part.place.path else "")
    if isinstance(part.method, ModuleCopy):
        return path + name.removeprefix("copy.")
    if isinstance(part.method, LoRA):
        embedding = (kind := kind_of(part.place.module)) is not None and kind.name == "embedding"
        return path + (f"lora_embedding_{name}" if embedding else f"lora_{name}.weight")
    return path + name


@torch.no_grad()
def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source.reshape(target.shape))


# ---- prompts: [N, D], for an encoder-decoder [2N, D], the encoder's first --------------------------------------------


def _prompt(adapter: Adapter, methods: Mapping[str, PromptTuning]) -> Entry:
    one = next(iter(methods.values())).P
    roles = ("encoder", "decoder") if adapter.two_stacks else tuple(methods)
    n = len(one)

    def read() -> Tensor:
        return torch.cat([methods[r].P.detach() if r in methods else torch.zeros_like(one.detach()) for r in roles])

    def write(tensor: Tensor) -> None:
        for i, role in enumerate(roles):
            if role in methods:
                _copy(tensor[i * n : (i + 1) * n], methods[role].P)

    return Entry(PROMPT, (n * len(roles), one.shape[1]), read, write)


# ---- prefixes: [N, layers * 2 * H * D], per layer keys, then values --------------------------------------------------


def one_tensor_prefix(adapter: Adapter) -> bool:
    """Whether the field has a layout for this prefix: joint, and in every layer of a model that is one stack."""
    config = adapter.config
    return isinstance(config, PrefixTuningConfig) and config.prefix_type == "joint" and not adapter.two_stacks


def _prefix(adapter: Adapter) -> Entry:
    methods = [p.method for p in adapter.parts if isinstance(p.method, PrefixTuning)]
    widths = [m.shape[1] * m.shape[2] * m.shape[3] for m in methods]

    def read() -> Tensor:
        return torch.cat([_projected(m).flatten(1) for m in methods], dim=1)

    def write(tensor: Tensor) -> None:
        for method, piece in zip(methods, tensor.split(widths, dim=1), strict=True):
            if method.projection is None:
                _copy(piece, method.P)

    return Entry(PROMPT, (methods[0].shape[0], sum(widths)), read, write)


def _projected(method: PrefixTuning) -> Tensor:
    keys, values = method.prefix()  # each (H, N, D)
    return torch.stack([keys, values]).permute(2, 0, 1, 3).detach().contiguous()


def _came_otherwise(_: Tensor) -> None:
    """A prefix with a projection is loaded from its training state; the file's values are what that gives."""
