"""What can be a row of a running batch: which models, and which compositions of adapters on them."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from coadapt.core.backbone import counts_by_mask, stacks
from coadapt.core.composition import Node, Sum, names, routers, terms, without
from coadapt.core.method import AttentionMethod, InputMethod
from coadapt.model import PeftModel
from coadapt.training.assemble import positions

from .cache import plain, windows

ASK = "Ask it with: coadapt generate"


@dataclass(frozen=True)
class Model:
    """What the engine needs to know of a base.

    Raises:
        ValueError: rows of it cannot come and go.
    """

    view: PeftModel
    windows: Sequence[int | None]
    """What each layer of its cache looks back on."""
    positions: int | None
    """Tokens that it takes, virtual ones and the answer among them; None where it does not say."""
    placed: bool
    """Whether it is told the position of each token."""
    keeps: bool
    """Whether it can be told to give the scores of the last token only."""

    @classmethod
    def of(cls, view: PeftModel, tokenizer: PreTrainedTokenizerBase) -> "Model":
        base: Any = view.get_base_model()
        kind = type(base).__name__
        if base.config.is_encoder_decoder:
            raise ValueError(f"{kind} is an encoder-decoder, and only causal language models are served. {ASK}")
        if not hasattr(base, "generate") or not base.can_generate():
            raise ValueError(f"{kind} writes no text; only causal language models are served. {ASK}")
        if view.merged_adapters:
            raise ValueError(
                "Adapters are merged into the base, so rows could not do without: unmerge_adapter() first."
            )
        told = inspect.signature(base.forward).parameters
        body: Any = stacks(base)[-1].module
        placed = "position_ids" in told
        if not placed and not counts_by_mask(body) and base.config.model_type != "bloom":
            raise ValueError(f"{kind} cannot be told the positions of a row's tokens, so it is not served. {ASK}")
        known = positions(base.config, tokenizer)
        if base.config.model_type == "bloom":
            known = [n for n in known if n != getattr(base.config, "seq_length", None)]
        return cls(view, windows(base.config), min(known, default=None), placed, "logits_to_keep" in told)


@dataclass(frozen=True)
class Served:
    """A composition, ready to be used by rows."""

    node: Node
    """What a prompt is read with."""
    goes_on: Node
    """What tokens behind it are read with: without its virtual tokens, which are in the cache then."""
    virtual: int
    """How many of those there are."""
    takes: int
    """Positions that it takes from a text: those of its prompts and prefixes."""
    joins: bool
    """Whether it joins keys to each attention call; then calls that do without it are spared it."""


def served(model: Model, node: Node) -> Served:
    """Looks a composition over, once.

    Raises:
        ValueError: it needs to know more of a row than its cache holds.
    """
    view = model.view
    with view.running(node, None, (), {}) as plan:
        _refuse(view, plan, node)
    virtual = _inputs(view, node)
    goes_on = node
    for name in virtual:
        goes_on = without(goes_on, name)
    count = _count(model, node) if virtual else 0
    moved = sum(_offset(view, name) for name, _ in terms(node, lambda _: True))
    joins = any(isinstance(p.method, AttentionMethod) for name in names(node) for p in view.get_adapter(name).parts)
    return Served(node, goes_on if names(goes_on) else Sum(), count, count + moved, joins)


def _offset(view: PeftModel, name: str) -> int:
    """By how many positions an adapter's prefix moves a text."""
    methods = [part.method for part in view.get_adapter(name).parts]
    return next((m.position_offset for m in methods if isinstance(m, AttentionMethod)), 0)


def _inputs(view: PeftModel, node: Node) -> list[str]:
    """The adapters that put virtual tokens in front."""
    return [n for n in names(node) if any(isinstance(p.method, InputMethod) for p in view.get_adapter(n).parts)]


def _refuse(view: PeftModel, plan: Any, node: Node) -> None:
    parts = {name: view.get_adapter(name).parts for name in names(node)}
    methods = [part.method for found in parts.values() for part in found]
    for name, found in parts.items():
        kinds = {isinstance(part.method, InputMethod) for part in found}
        if len(kinds) > 1:
            raise ValueError(f"{name!r} has virtual tokens and more in one adapter, which is not served. {ASK}")
    reasons = {
        "it asks for the task of each row": plan.tasks,
        "a router averages over the tokens so far": plan.keeps_sums,
        "a router reads the bare model's states": any(r.first_pass or r.pools for r, _ in routers(node)),
        "a router chooses among prompts": bool(_inputs(view, node) and routers(node)),
        "it counts from a text's end or beginning": any(m.reads_last or m.reads_tokens for m in methods),
        "it is active from an invocation on": any(m.invoked_by for m in methods),
        "it keeps states of its own beside the cache": plan.sources,
        "it has gates for the rows of one batch": plan.gate_rows,
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise ValueError(f"This adapter cannot be served: {'; '.join(found)}. {ASK}")


@torch.no_grad()
def _count(model: Model, node: Node) -> int:
    """How many virtual tokens stand in the cache: asked of one token, with nothing else."""
    base: Any = model.view.get_base_model()
    cache = plain(len(model.windows))
    ids = torch.zeros(1, 1, dtype=torch.long, device=base.device)
    with model.view.running(node, None, (), {}):
        base(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    return int(cache.get_seq_length()) - 1
