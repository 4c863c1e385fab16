"""loralib's state dicts: `….lora_A` and `….lora_B`, often beside the base's own weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .layers import LORA, Parts, add, checked, only_lora

_ENDS = {"lora_A": LORA[0], "lora_B": LORA[1]}


def is_one(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are keys of such a file."""
    return any(key.endswith((".lora_A", ".lora_B")) for key in tensors)


def read(tensors: Mapping[str, Tensor], alpha: float | None, enable: Sequence[bool] | None = None) -> Parts:
    """What is adapted; the base's weights beside it are left out.

    Args:
        alpha: loralib's `lora_alpha`, which its files do not hold.
        enable: loralib's `enable_lora` of layers that are several in one (queries, keys, values).

    Raises:
        ValueError: a number that the file does not hold is missing.
    """
    if alpha is None:
        raise ValueError("loralib's files do not say by what the change is multiplied: give --alpha, its lora_alpha.")
    parts: Parts = {}
    for key, tensor in tensors.items():
        path, _, end = key.rpartition(".")
        if end in _ENDS:
            add(parts, "", path, _ENDS[end], tensor)
    for path, changed in checked(parts)[""].items():
        a, b = (changed.tensors[name] for name in LORA)
        changed.alpha = alpha
        if b.shape[1] != len(a):
            changed.tensors[LORA[1]] = _apart(path, len(a), b, enable)
            changed.alpha = alpha * (len(a) // b.shape[1])
    return parts


def _apart(path: str, ranks: int, b: Tensor, enable: Sequence[bool] | None) -> Tensor:
    """B of several layers in one, on top of each other -> one matrix, each with ranks of its own."""
    r = b.shape[1]
    groups = ranks // r
    on = [True] * groups if enable is None and groups == 3 else enable
    if ranks % r or on is None or sum(on) != groups:
        raise ValueError(
            f"{path}: {groups} of the layers in it are adapted, and the file does not say which: give --enable, "
            "loralib's enable_lora, as in 1,0,1."
        )
    width = len(b) // groups
    whole = b.new_zeros(len(on) * width, ranks)
    at = [i for i, used in enumerate(on) if used]
    for n, (i, own) in enumerate(zip(at, b.chunk(groups), strict=True)):
        whole[i * width : (i + 1) * width, n * r : (n + 1) * r] = own
    return whole


def write(parts: Parts) -> dict[str, Tensor]:
    """For `load_state_dict(..., strict=False)` on a model whose layers have `lora_alpha = r`: every scale is in B."""
    only_lora(parts, "loralib")
    if list(parts) != [""]:
        raise ValueError(f"loralib's files are of one model; these are of {', '.join(parts)}.")
    out: dict[str, Tensor] = {}
    for path, changed in parts[""].items():
        a, b = changed.folded()
        if a.dim() > 2:
            raise ValueError(f"{path} is a convolution, which loralib reshapes in its own way; leave it out.")
        out |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
    return out
