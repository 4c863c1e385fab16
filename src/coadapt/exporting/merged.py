"""A base with a composition in its weights, for as long as a file is written of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core import merging
from ..core.adapter import ModuleCopy
from ..core.composition import Node, names
from ..core.method import AttentionMethod, InputMethod, WeightMethod
from ..core.store import quantised
from ..model import PeftModel
from .plain import is_new_bias


@contextmanager
def merged(view: PeftModel, node: Node) -> Iterator[nn.Module]:
    """The base, merged; afterwards it is as it was, to the bit."""
    before, config = view.composition, getattr(view.base, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    view.merge_adapter(node)
    try:
        merging.untie(view.base)
        yield view.base
    finally:
        if config is not None and getattr(config, "tie_word_embeddings", None) != tied:
            config.tie_word_embeddings = tied
        view.unmerge_adapter()
        view.set_adapter(before)


def refuse_unmergeable(view: PeftModel, node: Node, new_biases: bool) -> None:
    """Raises ValueError where a merged model cannot hold all of `node`.

    Args:
        new_biases: whether what is written has room for biases at layers that have none.
    """
    if found := [path for path, _, _ in quantised(view.base)]:
        raise ValueError(
            f"The base is quantised ({found[0]!r} and {len(found) - 1} other layers), and a merged model is written in "
            "floats. Make it one first: model.merge_and_unload(), coadapt merge."
        )
    adapters = {name: view.get_adapter(name) for name in names(node)}
    for name, adapter in adapters.items():
        for part in adapter.parts:
            if isinstance(part.method, AttentionMethod | InputMethod):
                raise ValueError(
                    f"{name!r} is virtual tokens ({type(part.method).__name__}), which cannot be merged into weights. "
                    "Name the others (adapters=, --adapters), or keep it where coadapt, or peft, runs."
                )
            if not isinstance(part.method, WeightMethod | ModuleCopy):
                raise ValueError(
                    f"{name!r} is of modules between layers ({type(part.method).__name__} at {part.place.path!r}), "
                    "which cannot be merged into weights, nor be a LoRA. Name the others (adapters=, --adapters), or "
                    "serve it with coadapt."
                )
    if not new_biases and (biases := is_new_bias(view.base, adapters, node)):
        raise ValueError(
            f"The composition gives biases to layers that have none, {biases[0]!r} among them; a "
            f"{type(view.base).__name__} that is loaded again would lose them. Name the others (adapters=, --adapters)."
        )


def vocabulary(base: Any) -> int | None:
    """How many rows the embedding has; None where there is none."""
    found = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    weight = getattr(found, "weight", None)
    return None if weight is None else len(weight)
