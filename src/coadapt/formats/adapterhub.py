"""Folders of AdapterHub's `adapters`: bottlenecks, LoRA, (IA)^3, prefixes, ReFT and unions of them, read."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..config import PeftConfig
from ..core import roles
from ..core.activation import activations
from ..core.adapter import Adapter, build, replace_options
from ..core.composition import Node, Seq
from ..core.target import layer_index
from ..methods.bottleneck import Bottleneck, BottleneckConfig
from ..methods.compacter import CompacterConfig
from ..methods.dora import DoRA
from ..methods.ia3 import IA3, IA3Config
from ..methods.invertible import Invertible
from ..methods.lora import LoraConfig
from ..methods.prefix import PrefixTuning, PrefixTuningConfig
from ..methods.reft import Reft, ReftConfig
from . import files

WEIGHTS = "adapter.safetensors"
_KEY = re.compile(
    r"^(?:(?P<path>.+?)\.)?(?P<group>adapters|loras|refts|prefix_tunings|invertible_adapters|shared_parameters)"
    r"\.(?P<name>[^.]+)\.(?P<rest>.+)$"
)
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}
_NOT_READ: Mapping[str, Any] = {
    "use_gating": False,
    "ln_before": False,
    "ln_after": False,
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "shared_W_phm": False,
    "factorized_phm_rule": False,
    "use_dora": False,  # theirs leaves the scale out of the length
    "vera_d": None,
    "vera_b": None,
}
"""Fields that change the result and have no counterpart here -> the value at which they say nothing."""


_Fill = Callable[[Adapter], None]


def is_one(said: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is one of AdapterHub's."""
    return "peft_type" not in said and "config" in said and "model_type" in said


def load(
    where: Path, said: Mapping[str, Any], base: Any, name: str, is_trainable: bool, half: bool
) -> tuple[list[Adapter], Node]:
    """The adapters of a folder, and how they are composed: a union is one adapter for each of its parts.

    Raises:
        ValueError: a method or an option that is not read, or tensors that do not fit this base; all are named.
    """
    config = said["config"]
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{where} names its configuration {config!r} instead of writing it out, as adapter-transformers 1 did. "
            "Load and save it with a later version of `adapters`."
        )
    tensors = _Tensors(_parsed(files.read_tensors(where / WEIGHTS), base))
    union = config.get("architecture") == "union"
    parts: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    if union:
        parts = [(str(c.get("architecture") or "bottleneck"), c) for c in config["configs"]]
        parts.sort(key=lambda part: part[0] != "lora")  # which acts below what reads the layer's output
    found: list[Adapter] = []
    for kind, own in parts:
        _refuse(where, own)
        made, fill = _READERS[str(own.get("architecture") or "bottleneck")](own, tensors, base)
        options: dict[str, Any] = {"inference_mode": not is_trainable, "init_seed": 0}
        options["base_model_name_or_path"] = said.get("model_name") or None
        called = f"{name}_{kind}" if union else name
        adapter = build(called, replace_options(made, **options), base, half, blank=True)
        adapter.config = replace_options(adapter.config, init_seed=None)
        with torch.no_grad():
            fill(adapter)
        found.append(adapter)
    if left := tensors.left():
        raise ValueError(f"{where} holds tensors for which this base has no place: {', '.join(left[:8])}.")
    node: Node = Seq(*(adapter.name for adapter in found)) if len(found) > 1 else found[0].name
    return found, node


def _refuse(where: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("architecture") or "bottleneck")
    if kind not in _READERS:
        raise ValueError(f"{where} holds {kind!r}; of AdapterHub's methods these are read: {', '.join(_READERS)}.")
    wrong = {k: config[k] for k, idle in _NOT_READ.items() if k in config and config[k] not in (idle, None)}
    if wrong:
        raise ValueError(f"{where} asks for {wrong}, which is not read here and would change the result.")


# ---- tensors --------------------------------------------------------------------------------------------------------


@dataclass
class _Tensors:
    """What a folder holds: (group, path of a module, rest of the key) -> value; what was asked for is marked."""

    by_place: dict[tuple[str, str, str], Tensor]

    def __post_init__(self) -> None:
        self.used: set[tuple[str, str, str]] = set()

    def paths(self, group: str) -> list[str]:
        """The modules that have something of this group, in the file's order."""
        return list(dict.fromkeys(path for own, path, _ in self.by_place if own == group))

    def take(self, group: str, path: str, rest: str) -> Tensor:
        """Raises ValueError where it is missing."""
        key = (group, path, rest)
        if key not in self.by_place:
            raise ValueError(f"{path}.{group}.….{rest} is missing in {WEIGHTS}.")
        self.used.add(key)
        return self.by_place[key]

    def has(self, group: str, path: str, rest: str) -> bool:
        return (group, path, rest) in self.by_place

    def left(self) -> list[str]:
        return [".".join(key) for key in self.by_place if key not in self.used]


def _parsed(tensors: Mapping[str, Tensor], base: Any) -> dict[tuple[str, str, str], Tensor]:
    out: dict[tuple[str, str, str], Tensor] = {}
    for key, tensor in tensors.items():
        if ".prefix_tuning.pool." in key:  # the whole prefix over again, at each layer
            continue
        found = _KEY.match(key)
        if found is None:
            raise ValueError(f"{key!r} in {WEIGHTS} is not read here.")
        out[found["group"], _in_base(found["path"] or "", base), found["rest"]] = tensor
    return out


def _in_base(path: str, base: Any) -> str:
    """A path as this base has it, which may be the body alone, or have another head."""
    prefix = getattr(base, "base_model_prefix", "")
    bare = path.removeprefix(f"{prefix}.") if prefix else path
    first = bare.partition(".")[0]
    return f"{prefix}.{bare}" if prefix and hasattr(getattr(base, prefix, None), first) else bare


def _copy(source: Tensor, target: Any, what: str) -> None:
    if source.shape != target.shape:
        raise ValueError(f"{what} has shape {tuple(source.shape)} in the file, {tuple(target.shape)} for this base.")
    target.copy_(source)


def _act(name: str) -> str:
    name = _ACTIVATIONS.get(name.lower(), name.lower())
    if name not in activations():
        raise ValueError(f"non_linearity={name!r} is not known to transformers.")
    return name


# ---- methods --------------------------------------------------------------------------------------------------------


def _bottleneck(config: Mapping[str, Any], tensors: _Tensors, base: Any) -> tuple[PeftConfig, _Fill]:
    paths = tensors.paths("adapters")
    products = bool(config.get("phm_layer"))
    sizes = {
        tensors.by_place["adapters", path, "adapter_down.0." + ("b" if products else "bias")].shape[0] for path in paths
    }
    if len(sizes) != 1:
        raise ValueError(f"Bottlenecks of widths {sorted(sizes)} in one adapter are not read.")
    options: dict[str, Any] = {
        "bottleneck_size": sizes.pop(),
        "non_linearity": _act(config["non_linearity"]),
        "scaling": config.get("scaling", 1.0),
        "adapter_dropout": config.get("dropout", 0.0),
        "stochastic_depth": config.get("stochastic_depth", 0.0),
        **_placement(config, paths, base),
    }
    if config.get("inv_adapter"):
        _refuse_embedding(base)
        options |= {
            "inv_adapter": config["inv_adapter"],
            "inv_adapter_reduction_factor": float(config["inv_adapter_reduction_factor"]),
        }
    made: PeftConfig = BottleneckConfig(**options)
    if products:
        made = CompacterConfig(
            **options,
            phm_dim=config["phm_dim"],
            phm_rank=config["phm_rank"] if config["factorized_phm_W"] else 1,
            factorized_phm_W=config["factorized_phm_W"],
            shared_phm_rule=config["shared_phm_rule"],
        )

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            if isinstance(part.method, Invertible):
                _fill_invertible(part.method, tensors)
            elif isinstance(part.method, Bottleneck):
                _fill_bottleneck(part.method, _location(part.place.path, paths) or part.place.path, tensors)
        if adapter.shared is not None:
            rule: Any = adapter.shared
            path = next(iter(tensors.paths("shared_parameters")), "")  # `adapters` forgets it in encoder-decoders
            _copy(tensors.take("shared_parameters", path, "phm_rule").mT, rule.A, "phm_rule")

    return made, fill


def _placement(config: Mapping[str, Any], paths: list[str], base: Any) -> dict[str, Any]:
    """Where such an adapter reads and writes, of what can be said here."""
    said = tuple(config.get(k) for k in ("original_ln_before", "original_ln_after", "residual_before_ln"))
    attention, output = bool(config.get("mh_adapter")), bool(config.get("output_adapter"))
    layers = {"layers_to_transform": sorted({n for path in paths if (n := layer_index(path)) is not None})}
    if config.get("is_parallel") and (attention, output) == (False, True):
        return {"placement": "parallel", "reads": "stream", **layers}
    blocks = roles.blocks(base)
    match said:
        case (False, True, True | False):
            ends = [end for block in blocks for end, _ in (*block.attention, *(block.feed_forward or ())[1:])]
            return {"target_modules": [end for end in ends if _location(end, paths)]}
        case (True, True, True) if output and not attention:
            return {"placement": "pfeiffer", "reads": "stream", **layers}
        case (True, False, False) if output and not attention:  # behind all of a block, its last norm too
            behind = [roles.norms_around(base, block)[1] for block in blocks]
            at = [norm[0] if norm else block.path for norm, block in zip(behind, blocks, strict=True)]
            return {"target_modules": [path for path in at if _location(path, paths)]}
        case _:
            told = {k: v for k, v in config.items() if re.search("original_ln|residual|adapter$", k)}
            raise ValueError(f"A bottleneck at such a place is not read: {told}.")


def _refuse_embedding(base: Any) -> None:
    """Theirs stands behind all that makes the first hidden states, ours right behind the embedding of the tokens."""
    blocks = tuple(f"{block.path}." for block in roles.blocks(base))
    outside = [m for path, m in base.named_modules() if isinstance(m, nn.Embedding) and not path.startswith(blocks)]
    if len(outside) > 1:
        raise ValueError(
            f"AdapterHub's invertible adapter stands behind positions and norms, which {type(base).__name__} adds to "
            "the embedding of its tokens; here it would stand before them, and is not read."
        )


def _location(at: str, paths: list[str]) -> str | None:
    """Where the file has what belongs to the place `at`: a module around it, or beside it in its block."""
    if around := [path for path in paths if at.startswith(f"{path}.")]:
        return max(around, key=len)
    kind = "attention_adapters" if re.search(r"attn|attention", at.lower()) else "output_adapters"
    beside = [path for path in paths if path.rpartition(".")[2] == kind and f"{at}.".startswith(_parent(path) + ".")]
    inside = [path for path in paths if path.startswith(f"{at}.")]  # of a whole block, which ends in its second part
    return next(iter((*beside, *inside)), None)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _fill_bottleneck(method: Bottleneck, path: str, tensors: _Tensors) -> None:
    for layer, key in ((method.down, "adapter_down.0"), (method.up, "adapter_up")):
        if isinstance(layer, nn.Linear):
            _copy(tensors.take("adapters", path, f"{key}.weight"), layer.weight, path)
            _copy(tensors.take("adapters", path, f"{key}.bias"), layer.bias, path)
            continue
        if tensors.has("adapters", path, f"{key}.b"):
            _copy(tensors.take("adapters", path, f"{key}.b"), layer.bias, path)
        if layer.rule is not None:
            _copy(tensors.take("adapters", path, f"{key}.phm_rule").mT, layer.rule.A, path)
        if layer.whole is not None:
            _copy(tensors.take("adapters", path, f"{key}.W").mT, layer.whole, path)
        else:  # theirs multiply from the left: (I, O)
            _copy(tensors.take("adapters", path, f"{key}.W_right").mT, layer.s, path)
            _copy(tensors.take("adapters", path, f"{key}.W_left").mT, layer.t, path)
    if isinstance(method.scale, Tensor):
        method.scale.copy_(tensors.take("adapters", path, "scaling").view(method.scale.shape))


def _fill_invertible(method: Invertible, tensors: _Tensors) -> None:
    if method.earlier:
        return
    (path,) = tensors.paths("invertible_adapters")
    for name in ("F", "G"):
        for key, value in getattr(method, name).state_dict(keep_vars=True).items():
            _copy(tensors.take("invertible_adapters", path, f"{name}.{key}"), value, name)


def _lora(config: Mapping[str, Any], tensors: _Tensors, base: Any) -> tuple[PeftConfig, _Fill]:
    paths = tensors.paths("loras")
    if config.get("composition_mode") == "scale":
        return _ia3(config, tensors, base)
    ranks = {path: _rank(config, tensors, path) for path in paths}
    usual = max(ranks.values())
    scale = config["alpha"] / config["r"]
    made = LoraConfig(
        r=usual,
        lora_alpha=scale * usual,
        lora_dropout=config.get("dropout", 0.0),
        target_modules=paths,
        use_dora=bool(config.get("use_dora")),
        rank_pattern={f"^{re.escape(path)}$": r for path, r in ranks.items() if r != usual},
        alpha_pattern={f"^{re.escape(path)}$": scale * r for path, r in ranks.items() if r != usual},
    )

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            path, method = part.place.path, part.method
            low: Any = method.change if isinstance(method, DoRA) else method
            a, b = (tensors.take("loras", path, f"lora_{n}") for n in "AB")
            if isinstance(method, DoRA):
                method.m.copy_(tensors.take("loras", path, "m.weight").view(method.m.shape))
            _copy(a, low.A, path)
            _copy(b if b.shape[1] == len(a) else _block_diagonal(config, b, len(a), len(low.B)), low.B, path)

    return made, fill


def _rank(config: Mapping[str, Any], tensors: _Tensors, path: str) -> int:
    return int(tensors.by_place["loras", path, "lora_A"].shape[0])


def _of_merged(config: Mapping[str, Any]) -> list[int]:
    """Which thirds of a layer that makes queries, keys and values at once are adapted."""
    return ["qkv".index(name) for name in sorted(config["attn_matrices"], key="qkv".index)]


def _block_diagonal(config: Mapping[str, Any], b: Tensor, ranks: int, outputs: int) -> Tensor:
    """B of several thirds on top of each other -> one matrix, each third with columns of its own."""
    at = _of_merged(config)
    width, r = outputs // 3, ranks // len(at)
    whole = b.new_zeros(outputs, ranks)
    for n, (third, own) in enumerate(zip(at, b.chunk(len(at)), strict=True)):
        whole[third * width : (third + 1) * width, n * r : (n + 1) * r] = own
    return whole


def _ia3(config: Mapping[str, Any], tensors: _Tensors, base: Any) -> tuple[PeftConfig, _Fill]:
    made = IA3Config(target_modules=tensors.paths("loras"), feedforward_modules=[])

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            assert isinstance(part.method, IA3)
            own, factors = tensors.take("loras", part.place.path, "lora_B").flatten() * config["alpha"], part.method.l
            if own.shape != factors.shape:
                whole = torch.ones(3, len(factors) // 3).to(own)
                for third, some in zip(_of_merged(config), own.chunk(len(_of_merged(config))), strict=True):
                    whole[third] = some
                own = whole.flatten()
            _copy(own, factors, part.place.path)

    return made, fill


_PREFIXES = {"encoder": "encoder_prefix", "cross": "cross_prefix"}


def _prefix(config: Mapping[str, Any], tensors: _Tensors, base: Any) -> tuple[PeftConfig, _Fill]:
    """Joined behind rotary embedding, and real tokens keep their positions; a network is worked out once."""
    (path,) = tensors.paths("prefix_tunings")
    n = int(config["prefix_length"])
    if any(hasattr(place.module, "compute_bias") for place in roles.attentions(base)):
        raise ValueError(
            f"AdapterHub's prefixes move the relative positions of {type(base).__name__}'s keys against its queries, "
            "which is not done here; so they are not read."
        )
    made = PrefixTuningConfig(num_virtual_tokens=n, position_offset=0)

    def fill(adapter: Adapter) -> None:
        by_role: dict[str, list[PrefixTuning]] = {}
        for part in adapter.parts:
            assert isinstance(part.method, PrefixTuning)
            by_role.setdefault(part.place.role, []).append(part.method)
        for role, methods in by_role.items():
            group = _PREFIXES[role] if len(by_role) > 1 and role in _PREFIXES else "self_prefix"
            _, two, heads, dim = methods[0].shape
            whole = _made(config, tensors, path, group).view(n, len(methods), two, heads, dim)
            for i, method in enumerate(methods):
                _copy(whole[:, i], method.P, group)

    return made, fill


def _made(config: Mapping[str, Any], tensors: _Tensors, path: str, group: str) -> Tensor:
    def take(rest: str) -> Tensor:
        return tensors.take("prefix_tunings", path, f"{group}.{rest}")

    if config.get("flat"):
        return take("control_trans")
    hidden = take("wte.weight") @ take("control_trans.0.weight").mT + take("control_trans.0.bias")
    hidden = activations()[_act(config["non_linearity"])](hidden)
    return hidden @ take("control_trans.2.weight").mT + take("control_trans.2.bias")


def _reft(config: Mapping[str, Any], tensors: _Tensors, base: Any) -> tuple[PeftConfig, _Fill]:
    if not config["orthogonality"] and "subtract_projection" not in config:
        warnings.warn(
            "AdapterHub's files of ReFT do not say whether the projection is subtracted. Without orthonormal rows this "
            "is read as NoReFT, as AdapterHub reads it; what was trained as DiReFT is another function.",
            stacklevel=2,
        )
    first = int(config["prefix_positions"])
    last = int(config["suffix_positions"])
    made = ReftConfig(
        layers=config["layers"],
        prefix_positions=first,
        suffix_positions=last,
        r=config["r"],
        orthogonality=config["orthogonality"],
        subtract_projection=config.get("subtract_projection", True),
        tied_weights=bool(config["tied_weights"] and first and last),
        dropout=config.get("dropout", 0.05),
        non_linearity=_act(config["non_linearity"]) if config.get("non_linearity") else None,
    )

    def fill(adapter: Adapter) -> None:
        for part in adapter.parts:
            path = f"{part.place.path}.reft_layer"
            method: Any = part.method
            assert isinstance(method, Reft)
            for n, edit in enumerate((method.first, method.last)):
                if edit is not None:
                    for name in ("weight", "bias"):
                        own = tensors.take("refts", path, f"units.{n}.learned_source.{name}")
                        _copy(own, edit.source.get_parameter(name), path)
                    _copy(_projection(config, tensors, path, n), edit.R, path)
        idle = [k for k in tensors.by_place if k[0] == "refts" and k[2].startswith(("units.0", "units.1"))]
        tensors.used |= {k for k in idle if f"{k[1]}" in {f"{p.place.path}.reft_layer" for p in adapter.parts}}

    return made, fill


def _projection(config: Mapping[str, Any], tensors: _Tensors, path: str, n: int) -> Tensor:
    """(R, D), from what PyTorch's own parametrisation of orthonormal matrices holds."""
    inside = f"units.{n}.projection"
    if not config["orthogonality"]:
        return tensors.take("refts", path, f"{inside}.weight")
    ends = ("parametrizations.weight.original", "parametrizations.weight.0.base")
    state = {end: tensors.take("refts", path, f"{inside}.{end}") for end in ends}
    rows, width = state[ends[0]].shape
    layer: Any = parametrizations.orthogonal(nn.Linear(width, rows, bias=False))
    layer.load_state_dict(state)
    made: Tensor = layer.weight
    return made.detach()


_READERS: dict[str, Callable[[Mapping[str, Any], _Tensors, Any], tuple[PeftConfig, _Fill]]] = {
    "bottleneck": _bottleneck,
    "lora": _lora,
    "prefix_tuning": _prefix,
    "reft": _reft,
}
