"""Virtual tokens in files: those of all layers, or stacks, in one tensor."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import InputMethod
from ..methods.cartridge import Cartridge, CartridgeConfig
from ..methods.cpt import CPT
from ..methods.prefix import PrefixTuning, PrefixTuningConfig
from .entry import Entry, copy, refuse_meta

PROMPT = "prompt_embeddings"

# ---- prompts: [N, D], for an encoder-decoder [2N, D], the encoder's first --------------------------------------------


def prompt(
    adapter: Adapter, methods: Mapping[str, InputMethod], key: str = PROMPT, name: str = "P", dim: int = 0
) -> Entry:
    """The parameter `name` of all stacks in one tensor, along `dim`; the tokens, where a network makes them."""

    def own(role: str) -> Tensor:
        found = getattr(methods[role], name, None)
        return (methods[role].prompt() if found is None else found).detach()

    one = own(next(iter(methods)))
    roles = ("encoder", "decoder") if adapter.two_stacks else tuple(methods)
    n = one.shape[dim]

    def read() -> Tensor:
        return torch.cat([own(role) if role in methods else torch.zeros_like(one) for role in roles], dim)

    def write(tensor: Tensor) -> None:
        for i, role in enumerate(roles):
            if role in methods:
                _copy_or_compare(tensor.narrow(dim, i * n, n), methods[role], own(role), name)

    shape = (*one.shape[:dim], n * len(roles), *one.shape[dim + 1 :])
    return Entry(key, shape, read, write)


def _copy_or_compare(stored: Tensor, method: nn.Module, made: Tensor, name: str = "P") -> None:
    """Where a network makes the virtual tokens, the file's must be those that it makes."""
    parameter = getattr(method, name, None)
    if isinstance(method, Cartridge | CPT):
        refuse_meta(made)
        with torch.no_grad():
            return method.start_at(stored.reshape(made.shape))
    if parameter is not None:
        return copy(stored, parameter)
    found = made.detach().float()
    if not torch.allclose(found, stored.reshape(found.shape).to(found), rtol=1e-2, atol=1e-4):
        raise ValueError(
            "The virtual tokens in adapter_model.safetensors are not what the network in training_state.safetensors "
            "makes: the two files are of different adapters. Without the second, the first loads for inference."
        )
    return None


# ---- prefixes: [N, layers * 2 * H * D], per layer keys, then values --------------------------------------------------


def in_one_tensor(adapter: Adapter) -> bool:
    """Whether the field has a layout for this prefix: joint, and in every layer of a model that is one stack."""
    config = adapter.config
    if isinstance(config, CartridgeConfig):
        return not adapter.two_stacks
    return isinstance(config, PrefixTuningConfig) and config.prefix_type == "joint" and not adapter.two_stacks


def prefix(adapter: Adapter) -> Entry:
    methods = [p.method for p in adapter.parts if isinstance(p.method, PrefixTuning)]
    widths = [m.shape[1] * m.shape[2] * m.shape[3] for m in methods]

    def read() -> Tensor:
        return torch.cat([_keys_values(m).flatten(1) for m in methods], dim=1)

    def write(tensor: Tensor) -> None:
        _write_pieces(methods, tensor.split(widths, dim=1))

    return Entry(PROMPT, (methods[0].shape[0], sum(widths)), read, write)


def computed(method: PrefixTuning, key: str) -> Entry:
    return Entry(key, method.shape, lambda: _keys_values(method), lambda t: _write_pieces([method], [t]))


def _write_pieces(methods: Sequence[PrefixTuning], pieces: Sequence[Tensor]) -> None:
    for method, piece in zip(methods, pieces, strict=True):
        _copy_or_compare(piece, method, _keys_values(method))


def _keys_values(method: PrefixTuning) -> Tensor:
    """(N, 2, H, D)"""
    keys, values = method.prefix()  # each (H, N, D)
    return torch.stack([keys, values]).permute(2, 0, 1, 3).detach().contiguous()
