"""`add_weighted_adapter`, the field's call: what its names mean here."""

from collections.abc import Mapping, Sequence

from ..config import did_you_mean
from ..core.adapter import Adapter
from ..core.composition import Node, Sum
from ..methods.dora import DoRA
from ..methods.lora import LoRA
from .ways import WAYS, Options

TYPES = {
    "svd": "svd",
    "cat": "cat",
    **{n: n for n in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")},
    **{f"{n}_svd": n for n in ("ties", "dare_linear", "dare_ties", "magnitude_prune")},
}
"""combination_type -> how. There, names without "svd" act on A and B apart; here all act on the changes themselves."""


def translated(
    adapters: Sequence[str],
    weights: Sequence[float],
    known: Mapping[str, Adapter],
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
    seed: int,
) -> tuple[Node, str, Options]:
    """The composition, the way and its options.

    Raises:
        ValueError: lists of unequal lengths, an unknown type, or an argument that has no effect with it.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights; each adapter needs one weight.")
    if combination_type not in TYPES:
        raise ValueError(
            f"There is no combination_type {combination_type!r}.{did_you_mean(combination_type, TYPES)} There are: "
            f"{', '.join(TYPES)}."
        )
    how = TYPES[combination_type]
    takes = WAYS[how].takes
    if svd_rank is not None and not combination_type.endswith("svd"):
        raise ValueError(
            f"svd_rank has no effect with combination_type={combination_type!r}; name one that ends in svd."
        )
    if majority_sign_method != "total" and "majority_sign" not in takes:
        raise ValueError(f"majority_sign_method has no effect with combination_type={combination_type!r}.")
    options = Options(
        r=None if how == "cat" else svd_rank or _largest_rank(adapters, known),
        density=density,
        majority_sign=majority_sign_method if "majority_sign" in takes else None,
        seed=seed if "seed" in takes else None,
    )
    return Sum(*adapters, weights=weights), how, options


def _largest_rank(adapters: Sequence[str], known: Mapping[str, Adapter]) -> int:
    methods = [part.method for name in adapters for part in known[name].parts]
    changes = [method.change if isinstance(method, DoRA) else method for method in methods]
    ranks = [change.B.shape[-1] for change in changes if isinstance(change, LoRA)]
    if not ranks:
        raise ValueError(
            f"None of {', '.join(map(repr, adapters))} has a rank that could be the default: give svd_rank."
        )
    return max(ranks)
