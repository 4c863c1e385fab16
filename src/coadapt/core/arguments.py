"""What a call of a view is given beside the base's own arguments, checked before anything runs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BATCHED = ("input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values", "decoder_input_ids")
"""Arguments that surely have one row for each of the batch (position ids may have one for all)."""


def tasks(task_ids: Any, plan: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """(B,) the task of each row, or None. Raises ValueError where they do not fit the call, or nothing reads them."""
    if task_ids is None:
        return None
    if not plan.tasks:
        raise ValueError(
            "task_ids has no effect: nothing that is active tells tasks apart (a TaskRouter, or an adapter for several "
            "tasks). Leave it out."
        )
    tasks = torch.as_tensor(task_ids).long().reshape(-1)
    rows = rows_of(args, kwargs)
    if rows is not None and len(tasks) != rows:
        raise ValueError(
            f"task_ids has {len(tasks)} entries, but the batch has {rows} rows; it needs one for each row."
        )
    if not torch.compiler.is_compiling() and (bad := [t for t in tasks.tolist() if not 0 <= t < plan.tasks]):
        raise ValueError(f"task_ids has {bad[0]}; what is active knows {plan.tasks} tasks, numbered from 0.")
    return tasks


def refuse_beams(base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where `generate` would put rows in another order, which running means do not follow."""
    config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or base.generation_config
    beams = kwargs.get("num_beams") or getattr(config, "num_beams", 1) or 1
    if beams > 1 and _caches(base, args, kwargs):
        raise ValueError(
            f"num_beams={beams} with a cache puts rows into another order, and the pooled router that is active keeps "
            "the mean of each row's tokens. Use use_cache=False, one beam, or a TokenRouter."
        )


def refuse_uncached(base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where `generate` would read the text anew for each token, so that its last tokens move."""
    if not _caches(base, args, kwargs):
        raise ValueError(
            "What is active edits the last tokens of a text, which without a cache are others for each new token. "
            "Leave use_cache=False out, or use an adapter without suffix_positions."
        )


def _caches(base: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or base.generation_config
    return kwargs.get("use_cache", getattr(config, "use_cache", True)) is not False


def length(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens `generate` is given in each row; None where they are no tokens."""
    ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    return ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How many rows a call has; None where nothing tells."""
    tensors = [v for v in (*args, *(kwargs.get(n) for n in _BATCHED), *kwargs.values()) if isinstance(v, Tensor)]
    return next((len(t) for t in tensors if t.dim()), None)


def check_gates(plan: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError where gates per row are not as many as the batch has rows."""
    rows = rows_of(args, kwargs) if plan.gate_rows else None
    if rows is not None and (wrong := [n for n in plan.gate_rows if n != rows]):
        raise ValueError(
            f"A gate per row was given for {wrong[0]} rows, but the batch has {rows} rows; it needs one number for "
            "each row."
        )


def check_names(names: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises TypeError for what is no list, ValueError where it has not one entry for each row."""
    if not isinstance(names, list | tuple):
        raise TypeError(
            f"adapter_names is a list with one composition for each row; got a {type(names).__name__}: {names!r}. "
            "Did you mean adapters=, for the whole call?"
        )
    rows = rows_of(args, kwargs)
    if rows is not None and rows != len(names):
        raise ValueError(
            f"adapter_names has {len(names)} entries, but the batch has {rows} rows; it needs one for each row. "
            "Beams and returned sequences follow their row, without entries of their own."
        )
