"""Folders of peft, one for each part of a pipeline, out of what other files hold, and back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import files
from ..files import CONFIG, WEIGHTS
from ..keys import ROOT
from .layers import NAMES, Changed, Parts, add, checked, common


def read(folder: Path) -> Parts:
    """One folder, or a folder of such folders by the parts' names."""
    found = {"": folder} if (folder / CONFIG).is_file() else {
        p.name: p for p in sorted(folder.iterdir()) if (p / CONFIG).is_file()
    }  # fmt: skip
    if not found:
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} is missing.")
    parts: Parts = {}
    for part, place in found.items():
        said = files.read_json(place / CONFIG)
        if said.get("peft_type") not in NAMES:
            raise ValueError(f"{place} holds {said.get('peft_type')}; {', '.join(NAMES)} can be written otherwise.")
        for key, tensor in files.read_tensors(place / WEIGHTS).items():
            path, name = _split(place, key)
            add(parts, part, path, name, tensor)
        for path, changed in parts[part].items():
            changed.alpha = _alpha(said, path, changed)
    return checked(parts)


def _split(place: Path, key: str) -> tuple[str, str]:
    for name in (name for names in NAMES.values() for name in names):
        if key.endswith(f".{name}"):
            return key.removeprefix(ROOT).removesuffix(f".{name}"), name
    raise ValueError(f"{place}: {key!r} is not the tensor of a plain LoRA, LoHa or LoKr at a layer.")


def _alpha(said: Mapping[str, Any], path: str, changed: Changed) -> float:
    pattern: Mapping[str, float] = said.get("alpha_pattern") or {}
    usual = said.get("lora_alpha" if said["peft_type"] == "LORA" else "alpha", 8)
    alpha = float(next((a for p, a in pattern.items() if re.match(rf"(.*\.)?({p})$", path)), usual))
    if changed.rank is None:  # whole matrices, scaled by a rank that is nowhere but in the configuration
        ranks: Mapping[str, int] = said.get("rank_pattern") or {}
        rank = next((r for p, r in ranks.items() if re.match(rf"(.*\.)?({p})$", path)), said.get("r", 8))
        changed.tensors["lokr_w1"] = changed.tensors["lokr_w1"] * (alpha / rank)
        return 1.0
    return alpha * changed.rank**0.5 if said.get("use_rslora") else alpha


def write(parts: Parts, out: Path, base: str | None) -> list[Path]:
    """A folder for each part and method; the only one is `out` itself. Returns them."""
    made: list[tuple[Path, str, dict[str, Changed]]] = []
    for part, modules in parts.items():
        methods = sorted({changed.method for changed in modules.values()})
        for method in methods:
            place = out / part / (method.lower() if len(methods) > 1 else "")
            made.append((place, method, {p: c for p, c in modules.items() if c.method == method}))
    for place, method, modules in made:
        with files.saving(place) as new:
            new.tensors(WEIGHTS, {f"{ROOT}{p}.{n}": t for p, c in modules.items() for n, t in c.tensors.items()})
            new.json(CONFIG, _config(method, modules, base))
    return [place for place, _, _ in made]


def _config(method: str, modules: Mapping[str, Changed], base: str | None) -> dict[str, Any]:
    ranks = {path: changed.rank or _beyond(changed) for path, changed in modules.items()}
    alphas = {path: changed.scale * ranks[path] for path, changed in modules.items()}
    r, alpha = common(list(ranks.values())), common(list(alphas.values()))
    said: dict[str, Any] = {
        "peft_type": method,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha" if method == "LORA" else "alpha": alpha,
        "target_modules": sorted(modules),
        "rank_pattern": {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
    }
    if method == "LORA":
        return {**said, "use_dora": _all_or_none(modules, "lora_magnitude_vector")}
    said["use_effective_conv2d"] = any(n in c.tensors for c in modules.values() for n in ("hada_t1", "lokr_t2"))
    if method == "LOKR":
        said |= _kronecker(modules)
    return said


def _all_or_none(modules: Mapping[str, Changed], name: str) -> bool:
    having = [path for path, changed in modules.items() if name in changed.tensors]
    if having and len(having) < len(modules):
        raise ValueError(f"{having[0]} has lengths (DoRA) and {len(modules) - len(having)} other modules have none.")
    return bool(having)


def _beyond(changed: Changed) -> int:
    """A rank at which nothing is written as a product."""
    return max(size for tensor in changed.tensors.values() for size in tensor.shape)


def _kronecker(modules: Mapping[str, Changed]) -> dict[str, Any]:
    both = {"lokr_w1_a" in changed.tensors for changed in modules.values()}
    sizes = {_first(changed.tensors) for changed in modules.values()}
    return {"decompose_both": True in both, "decompose_factor": _factor(modules, sizes)}


def _first(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    if "lokr_w1" in tensors:
        return tensors["lokr_w1"].shape[0], tensors["lokr_w1"].shape[1]
    return tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1]


def _factor(modules: Mapping[str, Changed], sizes: set[tuple[int, int]]) -> int:
    """The `factor` of LyCORIS, which its files do not hold: what all first factors are, else as square as possible."""
    found = {size for pair in sizes for size in pair}
    return found.pop() if len(found) == 1 else -1
