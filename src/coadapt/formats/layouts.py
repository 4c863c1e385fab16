"""Tensors that files hold otherwise than a method does."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter, Part
from ..core.bypass import holders
from ..core.store import value as stored
from ..methods.adamss import AdaMSS
from ..methods.lora import LoRA
from ..methods.monteclora import MonteCLoRA
from ..methods.trainable_tokens import KeptRows, TrainableTokens
from ..methods.vblora import VBLoRA
from .entry import Entry, copy, refuse_meta, whole
from .vocabulary import ROOT, embeddings


def with_taken(entry: Entry, method: LoRA, name: str) -> Entry:
    """`entry` of A or B, with A0 or -B0 as further ranks where a start took them: a plain LoRA that says the same."""
    if method.A0 is None or method.B0 is None or not method.keeps_taken or name not in ("A", "B"):
        return entry
    own, taken, sign = (method.A, method.A0, 1) if name == "A" else (method.B, method.B0, -1)
    dim = method.B.dim() - (2 if name == "A" else 1)
    ranks = [own.shape[dim], taken.shape[dim]]
    shape = (*entry.shape[:dim], sum(ranks), *entry.shape[dim + 1 :])

    def write(tensor: Tensor) -> None:
        trained, frozen = tensor.split(ranks, dim)
        entry.write(trained)
        copy(sign * frozen, taken)

    return Entry(entry.key, shape, lambda: torch.cat([own.detach(), sign * taken], dim).reshape(shape), write)


def turned(method: LoRA, keys: Mapping[str, str], taken: bool) -> Iterator[Entry]:
    """A layer that is tied to one with the transposed weight: the factors there, as the field has them here.

    `keys`: of "A" and "B".
    """
    for name, other in (("A", "B"), ("B", "A")):
        own = whole("", method.get_parameter(other))
        there = with_taken(own, method, other) if taken else own

        def write(tensor: Tensor, key: str = keys[name], there: Entry = there) -> None:
            now = there.read()
            if not torch.equal(now, tensor.mT.to(now)):
                raise ValueError(
                    f"{key} is not what the layer has that it is tied to (ensure_weight_tying): peft's parameters come "
                    "apart when its model is moved. Put ensure_weight_tying=false into adapter_config.json."
                )

        yield Entry(keys[name], there.shape[::-1], lambda there=there: there.read().mT.contiguous(), write)


def of_parameter(adapter: Adapter, part: Part, method: LoRA, path: str, taken: bool) -> Iterator[Entry]:
    """The field keeps all experts' factors in two matrices, A [E R, I] and B [O, R E], each expert's ranks apart in B.

    It wraps a module once for each of its parameters, so that the last one is outermost.
    """
    here = [p.place.parameter for p in adapter.parts if p.place.module is part.place.module and p.place.parameter]
    inside = "base_layer." * (len(here) - 1 - here.index(part.place.parameter))
    a, b = whole("", method.A), whole("", method.B)
    if taken:
        a, b = with_taken(a, method, "A"), with_taken(b, method, "B")
    rank, columns = a.shape[-2:]
    yield Entry(
        f"{ROOT}{path}.{inside}lora_A.weight",
        (math.prod(a.shape) // columns, columns),
        lambda: a.read().reshape(-1, columns),
        lambda t: a.write(t.view(a.shape)),
    )
    key = f"{ROOT}{path}.{inside}lora_B.weight"
    if len(b.shape) == 2:
        yield Entry(key, b.shape, b.read, b.write)
        return
    experts, out, _ = b.shape
    yield Entry(
        key,
        (out, rank * experts),
        lambda: b.read().permute(1, 2, 0).reshape(out, -1),
        lambda t: b.write(t.view(out, rank, experts).permute(2, 0, 1)),
    )


def grouped(method: AdaMSS, inside: str) -> Iterator[Entry]:
    """The field has a matrix for each group of outputs; those that a group's rank leaves out are not there."""
    yield whole(f"{inside}adamss_newB", method.V)
    for k, (rows, rank) in enumerate(method.subspaces()):
        yield whole(f"{inside}adamss_A.{k}", method.A[k, :rank])

        def write(tensor: Tensor, rows: Tensor = rows, rank: int = rank) -> None:
            with torch.no_grad():
                method.B[rows, :rank] = tensor.to(method.B)

        shape = len(rows), rank
        yield Entry(f"{inside}adamss_B.{k}", shape, lambda r=rows, n=rank: method.B.detach()[r, :n].clone(), write)


def chosen(method: VBLoRA, name: str, key: str) -> Iterator[Entry]:
    """Which vectors each piece has, in as few bits as there are vectors, and the weights of all but the last."""
    logits = method.get_parameter(name)
    *pieces, count = logits.shape
    k = method.topk
    small = torch.uint8 if count < 2**8 else torch.int16 if count < 2**15 else torch.int32
    got: dict[str, Tensor] = {}

    def write(what: str, tensor: Tensor) -> None:
        refuse_meta(logits)
        got[what] = tensor
        if len(got) == 2:
            method.settle(logits, got["indices"], got["weights"])

    def indices() -> Tensor:
        return logits.detach().topk(k, dim=-1).indices.to(small)

    def weights() -> Tensor:
        return logits.detach().topk(k, dim=-1).values.softmax(-1)[..., :-1].contiguous()

    yield Entry(f"{key}_topk_indices", (*pieces, k), indices, lambda t: write("indices", t))
    yield Entry(f"{key}_topk_weights", (*pieces, k - 1), weights, lambda t: write("weights", t))


def kept(adapter: Adapter, part: Part, base: nn.Module) -> Iterator[Entry]:
    """The whole embedding, as the field writes it where the vocabulary was resized; of tied ones the first."""
    for path, module in embeddings(base).items():
        weight = module.get_parameter("weight")
        if part.place.module.weight is weight and next(
            p for p in adapter.parts if isinstance(p.method, KeptRows) and p.place.module.weight is weight
        ) is part:  # fmt: skip
            rows: Any = part.method
            whole = weight.detach().index_copy(0, rows.ids.to(weight.device), rows.rows.to(weight.dtype))
            yield Entry(f"{ROOT}{path}.weight", tuple(weight.shape), lambda whole=whole: whole, lambda _: None)


def tokens_beside(adapter: Adapter, part: Part, path: str) -> Iterator[Entry]:
    """Rows of tokens in a LoRA's file; those of a tied head are the embedding's."""
    rows = part.method.get_parameter("rows")
    first = next(p for p in adapter.parts if isinstance(p.method, TrainableTokens) and p.method.rows is rows)
    if first is part:
        yield whole(f"{ROOT}{path}.token_adapter.trainable_tokens_delta", rows)


def holder(part: Part, base: nn.Module) -> str | None:
    """The module that holds the weight of a part's, and of others, where that is the first of them: T5's `shared`."""
    return next((path for path, tied in holders(base).items() if part.place.path == tied[0]), None)


def last_drawn(method: MonteCLoRA, inside: str) -> Iterator[Entry]:
    """The field stores what its last training call drew, of which nobody makes use; we write what it starts with."""
    rank, n = len(method.v), len(method.c)
    yield Entry(f"{inside}gaussian_var_prior", (rank, rank), lambda: torch.eye(rank), lambda _: None)
    yield Entry(f"{inside}expert_weights", (n,), lambda: torch.ones(n) / n, lambda _: None)


def bias(part: Part, key: str) -> Entry:
    """The field stores the trained bias, we its change."""
    change = part.method.get_parameter("delta")
    module = part.place.module

    def read() -> Tensor:
        return stored(module, "bias").to(change) + change.detach()

    def write(tensor: Tensor) -> None:
        copy(tensor.to(change) - stored(module, "bias").to(change), change)

    return Entry(key, tuple(change.shape), read, write)
