"""The loss of a call in which virtual tokens have labels of their own: it is made here, in place of the base's. And
what networks beside the model add to it while they train."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .frame import current
from .gates import per_row
from .input import picked
from .layer import Layer
from .method import InputMethod
from .stream import Source, begun

_TAKEN = ("labels", "num_items_in_batch", "input_type_mask")
"""What the base is not given then."""


def called(plan: Any, call: Callable[[Mapping[str, Any]], Any], kwargs: Mapping[str, Any], base: Any) -> Any:
    """`call(kwargs)`, where there are labels, with all that is learned from beside them in its loss.

    Raises:
        ValueError: as `_with_virtual`.
    """
    out, labels = _with_virtual(plan, call, kwargs), kwargs.get("labels")
    learning = [source for source in plan.sources if source.training and source.weight]
    if labels is None or not learning:
        return out
    more = _of_sources(plan, learning, labels, kwargs.get("num_items_in_batch"), base.get_output_embeddings())
    if isinstance(out, tuple):
        return (out[0] + more, *out[1:])
    out["loss"] = out["loss"] + more
    return out


def _of_sources(plan: Any, sources: Sequence[Source], labels: Tensor, count: Any, head: Any) -> Tensor:
    """The loss of the head on what each state begins as, in the rows that use it, by the mean over all labels."""
    frame, total = current(), torch.zeros((), device=labels.device)
    assert frame is not None
    targets = labels[:, 1:]
    count = (targets != -100).sum() if count is None else count
    for source in sources:
        state = begun(frame, source)
        assert state is not None
        used = torch.tensor(plan.sources[source], device=labels.device)
        rows = (
            used.expand(len(labels)) if frame.rows is None else used[per_row(frame.rows.to(labels.device), len(labels))]
        )
        scores = head(state.to(Layer(head).like().dtype))[:, :-1].float()
        own = targets.masked_fill(~rows[:, None], -100).to(scores.device)
        total = total + source.weight * F.cross_entropy(scores.mT, own, reduction="sum").to(total.device) / count
    return total


def _with_virtual(plan: Any, call: Callable[[Mapping[str, Any]], Any], kwargs: Mapping[str, Any]) -> Any:
    """`call(kwargs)`; where there are labels, and virtual tokens have some too, with the loss of both.

    Raises:
        ValueError: several methods, or only some rows, have such tokens.
    """
    labels, frame = kwargs.get("labels"), current()
    if not plan.labelled or labels is None or frame is None:
        return call(kwargs)
    method: InputMethod = plan.labelled[0]
    if len(plan.labelled) > 1 or len(plan.nodes) > 1:
        raise ValueError(
            f"{type(method).__name__} learns from its own tokens, and a call has one loss: use one such adapter, for "
            "all rows of the batch; or leave labels out, and make the loss of the logits."
        )
    if kwargs.get("input_type_mask") is not None:
        raise ValueError("input_type_mask is not read: labels of -100 say which tokens the loss leaves out.")
    frame.whole = True
    out = call({k: v for k, v in kwargs.items() if k not in _TAKEN})
    at: Tensor | None = frame.kept
    if at is None:  # a gate of 0 has put no tokens in
        return call(kwargs)
    scores = out[0] if isinstance(out, tuple) else out["logits"]
    loss = _loss(method, scores, labels, at, kwargs.get("num_items_in_batch"))
    short = scores if method.keeps_virtual_tokens else picked(scores, at)
    if isinstance(out, tuple):
        return (loss, short, *out[1:])
    out["logits"] = short
    if out.get("hidden_states") is not None and not method.keeps_virtual_tokens:
        out["hidden_states"] = tuple(picked(states, at) for states in out["hidden_states"])
    return type(out)(loss=loss, **out)


def _loss(method: InputMethod, scores: Tensor, labels: Tensor, at: Tensor, count: Any) -> Tensor:
    """The mean over all tokens with a label, weighted.

    Args:
        scores: (B, N + T, V). labels: (B, T). at: (B, T) where those stand.
        count: of labels in all calls of one optimiser step, where a trainer tells; the calls' losses are added up.
    """
    assert method.labels is not None
    own, weight = (t.to(at.device) for t in method.labels)
    rows, length = scores.shape[:2]
    if length != len(own) + labels.shape[1]:
        raise ValueError(
            f"{type(method).__name__}: its loss needs {len(own)} virtual tokens in front of the {labels.shape[1]} of "
            f"the input, and the call has {length} tokens. Leave other prompts, packed rows and logits_to_keep out, or "
            "give no labels."
        )
    virtual = torch.ones(rows, length, dtype=torch.bool, device=at.device).scatter(1, at, False)
    targets = labels.new_zeros(rows, length).scatter(1, at, labels).masked_scatter(virtual, own.repeat(rows))[:, 1:]
    weights = torch.ones(rows, length, device=at.device).masked_scatter(virtual, weight.repeat(rows))[:, 1:]
    each = F.cross_entropy(scores[:, :-1].float().mT, targets, reduction="none") * weights
    mean = each.sum() / (targets != -100).sum()
    return mean if count is None else mean * (labels[:, 1:] != -100).sum() / count
