"""adapter_config.json: an adapter's configuration as the field's programs read it, and theirs as we do."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from torch import nn

from ..config import InputConfig, PeftConfig, TargetedConfig
from ..core import target, tying
from ..core.adapter import Adapter, ModuleCopy, replace_options
from ..core.backbone import backbones
from ..core.bypass import holders
from ..core.layer import kind_of
from ..core.method import method_for
from ..core.replication import blocks_of
from ..core.roles import HEADS, Place
from ..core.target import suffix_match
from ..inits import named
from ..methods.adaption_prompt import AdaptionPromptConfig
from ..methods.boft import BOFTConfig
from ..methods.cartridge import CartridgeConfig
from ..methods.hira import HiraConfig
from ..methods.ia3 import FEED_FORWARD, IA3Config
from ..methods.lora import LoRA, LoraConfig
from ..methods.miss import MissConfig
from ..methods.multitask_prompt import MultitaskPromptTuningConfig
from ..methods.prefix import PrefixTuningConfig
from ..methods.prompt import PromptTuningConfig
from ..methods.trainable_tokens import TrainableTokens, TrainableTokensConfig
from . import names

PEFT_VERSION = "0.21.2"
"""Of the field's library whose layout is written."""
READABLE = "readable_by_peft"
"""Written as false into a configuration that the field's library would get wrong."""
_OURS = (
    "prompt_sites",
    "output_virtual_tokens",
    "prefix_sites",
    "prefix_type",
    "prefix_layout",
    "position_offset",
    "routing",
)
_START = ("init_from", "init_seed", "init_lora_weights", "init_ia3_weights", "init_weights")
_WITH_NULL = frozenset({"task_type", "base_model_name_or_path", "revision", "modules_to_save"})
"""Written also where they are None, since some readers ask for them."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def described(adapter: Adapter, base: nn.Module) -> dict[str, Any]:
    """The configuration as a file holds it, with what was found in the model for the fields that were left out."""
    config = adapter.config
    said = config.to_dict() | {"peft_version": PEFT_VERSION, "inference_mode": True}
    for name in _START:
        said.pop(name, None)
    assumed = _assumed(config.peft_type, base)
    for name in _OURS:  # the field's library warns of fields that it does not know
        if name in said and said[name] == assumed.get(name, _default(config, name)):
            del said[name]
    if isinstance(config, LoraConfig):
        said |= _of_lora(config)
    if isinstance(config, MissConfig):
        said["init_weights"] = config.init_weights or True  # is its form, too
    if isinstance(config, TargetedConfig) and readable(config, adapter, base):
        said |= _targets(config, adapter, base)
    if not readable(config, adapter, base):
        said[READABLE] = False
    said |= {k: v for k, v in adapter.facts.items() if said.get(k) is None}
    without_copies = isinstance(config, AdaptionPromptConfig | TrainableTokensConfig)  # in the field's library
    unknown = ("modules_to_save",) if without_copies else ()
    return {k: v for k, v in said.items() if v is not None or (k in _WITH_NULL and k not in unknown)}


def _default(config: PeftConfig, name: str) -> Any:
    return next((f.default for f in fields(config) if f.name == name), MISSING)


def _assumed(kind: Any, base: Any) -> dict[str, Any]:
    """What a file of the field means on `base` where it does not say it, and where that is not our default.

    T5 and its kin have another layout for prefixes; an encoder returns, and pools, the virtual tokens' states too.
    """
    facts = getattr(base, "config", None)
    match kind:
        case "PREFIX_TUNING" if getattr(facts, "is_encoder_decoder", False):
            return {"prefix_layout": "peft"}
        case "LILY":
            return {"routing": "batch"}
        case "MULTITASK_PROMPT_TUNING" if getattr(facts, "is_encoder_decoder", False):
            return {"prompt_sites": ["encoder", "decoder"]}
        case "PROMPT_TUNING" | "MULTITASK_PROMPT_TUNING" | "P_TUNING" if [b.role for b in backbones(base)] == [
            "encoder"
        ]:
            return {"output_virtual_tokens": True}
        case _:
            return {}


def _whole(alpha: float) -> float:
    """An int where it is one: not every reader takes 16.0."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _of_lora(config: LoraConfig) -> dict[str, Any]:
    """Its start is past, unless something stays frozen by it; what that took from the base are further ranks."""
    config = with_taken(config)
    return {
        "init_lora_weights": config.init_lora_weights,
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "lora_alpha": _whole(config.lora_alpha),
        "alpha_pattern": {k: _whole(v) for k, v in config.alpha_pattern.items()},
        **{name: getattr(config, name) for name in _OF_DATA},
        **({} if config.loftq_config else {"loftq_config": None}),
        **({} if config.ensure_weight_tying else {"ensure_weight_tying": None}),  # peft before 0.19 does not know it
        **({} if config.alora_invocation_tokens is None else {"task_type": "CAUSAL_LM"}),  # the field asks for it
    }


def with_taken(config: LoraConfig) -> LoraConfig:
    """The LoRA whose factors are [A; A0] and [B, -B0]; the same one where nothing was taken from the base."""
    how, _ = named(config.init_lora_weights)
    config = replace(config, init_lora_weights=True, **dict.fromkeys(_OF_DATA)) if how.data else config
    if not how.from_base:
        kept = how.freezes_b or config.init_lora_weights == "loftq"
        return replace(config, init_lora_weights=config.init_lora_weights if kept else True)
    more = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        init_lora_weights=True,
        r=2 * config.r,
        rank_pattern={k: 2 * r for k, r in config.rank_pattern.items()},
        lora_alpha=more * config.lora_alpha,
        alpha_pattern={k: more * alpha for k, alpha in config.alpha_pattern.items()},
    )


_OF_DATA = ("eva_config", "corda_config", "lora_ga_config")
_OF_START = (*_OF_DATA, "init_lora_weights", "r", "rank_pattern", "lora_alpha", "alpha_pattern")


def asked_start(config: PeftConfig) -> dict[str, Any] | None:
    """What was asked for where the file says it in other words: a start that took ranks from the base."""
    if not isinstance(config, LoraConfig) or not named(config.init_lora_weights)[0].from_base:
        return None
    return {name: value for name, value in config.to_dict().items() if name in _OF_START}


def with_start(config: PeftConfig, asked: Mapping[str, Any] | None) -> PeftConfig:
    """Undoes `with_taken` where a file that was written so says what was asked for."""
    if asked is None or not isinstance(config, LoraConfig):
        return config
    before = replace(config, **asked)
    return before if with_taken(before) == config else config


def takes_from_base(config: PeftConfig) -> bool:
    """Whether a file holds A and B alone, and what was taken from the base has to be worked out again.

    So with KaSA and LoftQ; and with PiSSA and OLoRA in a folder of the field, which does the same: there it is told.

    Raises:
        ValueError: what was taken depends on data, and cannot be worked out again.
    """
    if not isinstance(config, LoraConfig):
        return False
    if config.kasa_config is not None or config.init_lora_weights == "loftq":
        return True
    how, _ = named(config.init_lora_weights)
    if how.from_base and how.data:
        raise ValueError(
            f"This folder holds what was trained after init_lora_weights={config.init_lora_weights!r} had changed its "
            "base, and the change, which depends on data, is not in it. Where the changed base was saved, load it, and "
            "put init_lora_weights=true into adapter_config.json; otherwise have peft write the folder with "
            "path_initial_model_for_weight_conversion."
        )
    if how.from_base:
        warnings.warn(
            f"This folder was trained on a base that init_lora_weights={config.init_lora_weights!r} had changed. The "
            "change is worked out again and kept in the adapter; it is the same if this is the same base.",
            stacklevel=2,
        )
    return how.from_base


def _targets(config: TargetedConfig, adapter: Adapter, base: nn.Module) -> dict[str, Any]:
    """Targets as a list: the last parts of their names where those name just them, else whole paths."""
    places = [p.place for p in adapter.parts if isinstance(p.method, method_for(config))]
    said: dict[str, Any] = {}
    if hasattr(config, "fan_in_fan_out"):
        said["fan_in_fan_out"] = any("Conv1D" in type(p.module).__name__ for p in places)
    inputs = [p.path for p in places if p.role == FEED_FORWARD]
    if isinstance(config, IA3Config):
        said |= {"feedforward_modules": inputs, "target_modules": sorted(p.path for p in places)}
    layers = [p.path for p in places if not p.parameter]
    if isinstance(config, TrainableTokensConfig):
        layers = _holding(adapter, base)
    none = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if any(path.rpartition(".")[2].isdigit() for path in layers):  # whole blocks, whose names are their numbers
        return said | {"target_modules": sorted(layers), **dict.fromkeys(none)}
    words = target.named_parts(config)
    found = isinstance(config.target_modules, str) or words or (config.target_modules is None and layers)
    found = found or tying.same(config)  # the field wants the tied ones named
    if isinstance(config, IA3Config) or found:
        ends = _ends(layers)
        by_name: dict[str, Any] = {}
        if words and (raw := [p.path for p in places if p.parameter]):
            by_name["target_parameters"] = sorted({re.sub(r".*\.\d+\.", "", path) for path in raw})
        changes: dict[str, Any] = {"target_modules": ends or None, **by_name}
        if isinstance(config, IA3Config):
            changes["feedforward_modules"] = _ends(inputs)
        if _same(config, changes, places, base):
            return said | changes
        return said | by_name | {"target_modules": sorted(layers), **dict.fromkeys(none)}
    return said


def _holding(adapter: Adapter, base: nn.Module) -> list[str]:
    """Of tied layers the first, or what only holds their weight (T5's `shared`): the field finds the others itself."""
    held = {own: path for path, tied in holders(base).items() for own in tied}
    first: dict[int, str] = {}
    for part in adapter.parts:
        if isinstance(part.method, TrainableTokens):
            first.setdefault(id(part.method.rows), held.get(part.place.path, part.place.path))
    return list(first.values())


def _ends(paths: Iterable[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _same(config: TargetedConfig, changes: Mapping[str, Any], places: Sequence[Place], base: nn.Module) -> bool:
    """Whether a configuration so changed has the same places."""
    other = replace_options(config, **changes)
    try:
        found = method_for(other).places(other, base)
    except ValueError:  # a last part also names what cannot be adapted
        return False
    return {(p.path, p.role) for p in found} == {(p.path, p.role) for p in places}


def readable(config: PeftConfig, adapter: Adapter, base: nn.Module) -> bool:
    """Whether the field's library, given this folder, computes what coadapt does."""
    as_theirs = all(getattr(config, k) == v for k, v in _assumed(config.peft_type, base).items())
    if config.method != "LORA" and any(part.place.parameter for part in adapter.parts):
        return False  # which has parameters for plain LoRA only
    match config:
        case MultitaskPromptTuningConfig():
            return as_theirs
        case InputConfig():
            return as_theirs and (not adapter.two_stacks or list(config.prompt_sites or ["encoder"]) == ["encoder"])
        case PrefixTuningConfig() | CartridgeConfig():
            moves = config.position_offset in (None, config.num_virtual_tokens)
            one = isinstance(config, PrefixTuningConfig) or not adapter.two_stacks
            return as_theirs and moves and one and config.prefix_type == "joint"
        case BOFTConfig() if config.boft_n_butterfly_factor > 1:  # which it makes 1 where its CUDA code is not built
            return False
        case HiraConfig() if config.rank_pattern:  # which they do not read
            return False
        case AdaptionPromptConfig():
            facts: Any = base.config
            return facts.model_type in ("llama", "mistral", "gpt2") and not config.modules_to_save
        case LoraConfig() if config.use_qalora or config.init_lora_weights == "loftq":
            return False  # at GPTQ's layers only; with a GPU and bitsandbytes only, and scaled otherwise
        case LoraConfig() if _ties_embeddings(adapter):
            return False
        case LoraConfig() if config.layer_replication and not _REPEATED.fullmatch(blocks_of(base)):
            return False
        case _:
            method = method_for(config)
            takes = names.TAKES.get(method.registered)
            layers = [p.place.module for p in adapter.parts if isinstance(p.method, method)]
            known = takes is None or all(any(c.__name__ in takes for c in type(m).__mro__) for m in layers)
            return as_theirs and method.registered in names.SITES and known


_REPEATED = re.compile(r"(model\.)*((bert\.)?encoder\.layer|layers|h)")
"""Where the field's library looks for the blocks that it repeats."""


def _ties_embeddings(adapter: Adapter) -> bool:
    """Whether embeddings are tied to each other in it, which the field does for heads only."""
    methods = [(p.place.module, p.method) for p in adapter.parts]
    tied = [m for m, method in methods if (isinstance(method, LoRA | ModuleCopy) and method.tied)]
    return any((kind := kind_of(m)) is not None and kind.name == "embedding" for m in tied)


def asked_targets(config: PeftConfig) -> str | None:
    """What was asked for where the file says it in other words: a regular expression, or "all-linear"."""
    targets = config.target_modules if isinstance(config, TargetedConfig) else None
    return targets if isinstance(targets, str) else None


# ---- reading ---------------------------------------------------------------------------------------------------------


def understood(values: Mapping[str, Any], base: Any) -> PeftConfig:
    """A configuration from the fields of a file, by whichever program it was written.

    Raises:
        ValueError: an unknown method, or a field that would change the result and is not read here.
    """
    said = {k: v for k, v in values.items() if k != READABLE}
    said["modules_to_save"] = _there(said.get("modules_to_save"), base)
    said.pop("fan_in_fan_out", None)  # found in the model
    match said.get("peft_type"):
        case "LORA" | "IA3":
            for name in (*_OF_DATA, "loftq_config"):
                if said.get("init_lora_weights") != name.removesuffix("_config"):
                    said.pop(name, None)
            if drawn := said.get("monteclora_config"):  # numbers are not drawn ahead here
                said["monteclora_config"] = {k: v for k, v in drawn.items() if k != "buffer_size"}
            said["target_modules"] = said.get("target_modules") or None  # the field writes [] beside target_parameters
        case "ADALORA":
            said.pop("r", None)  # a LoRA's, of which it makes no use
            if said.get("total_step") is None:  # it could be left out until peft 0.14
                said["total_step"] = (said.get("tinit") or 0) + (said.get("tfinal") or 0) + 1
                warnings.warn(
                    "This AdaLoRA file does not say how many steps its training has (total_step). For inference that "
                    "means nothing; to train on, put it into adapter_config.json.",
                    stacklevel=2,
                )
        case "SHADOW":  # the field's library has it at all that it lists
            said.pop("layers_to_transform", None)
            said.pop("layers_pattern", None)
        case "HIRA" if READABLE not in values:
            said.pop("rank_pattern", None)  # the field does not read it either
        case "MISS" | "BONE":
            if said["peft_type"] == "BONE":
                warnings.warn("Bone is called MiSS now; this file is read as one of MiSS.", stacklevel=2)
            said["peft_type"] = "MISS"
        case "OFT":
            _of_its_age(said)
        case "PREFIX_TUNING":
            if not said.get("prefix_projection"):
                said.pop("encoder_hidden_size", None)  # without one it says nothing
        case "CPT" if said.get("opt_weighted_loss_type", "none") == "none":
            said.pop("opt_loss_decay_factor", None)  # without a decay it says nothing
        case "P_TUNING" if str(said.get("encoder_reparameterization_type", "MLP")).endswith("MLP"):
            said.pop("encoder_num_layers", None)  # of the LSTM
            said.pop("encoder_dropout", None)
    for name, says_nothing in _IDLE.get(str(said.get("peft_type")), {}).items():
        if says_nothing(said):
            said.pop(name, None)
    return PeftConfig.from_dict({**_assumed(said.get("peft_type"), base), **said})


_Said = Mapping[str, Any]
_IDLE: Mapping[str, Mapping[str, Callable[[_Said], bool]]] = {
    "ADALORA": dict.fromkeys(("use_rslora", "alpha_pattern"), lambda said: True),  # which it does not read there either
    "CPT": {"cpt_prompt_init": lambda said: True},  # of the start
    "DEFT": {
        **dict.fromkeys(("alpha", "deft_dropout"), lambda said: bool(said.get("para"))),
        "init_scale": lambda said: True,  # of the start
    },
    "FROD": dict.fromkeys(("progressbar", "runtime_offload_base_weight"), lambda said: True),  # of how it runs
    "MISS": {
        "mini_r": lambda said: said.get("init_weights") != "mini",
        "miss_dropout": lambda said: said.get("init_weights") == "bat",
    },
    "OFT": {
        "eps": lambda said: not said.get("coft"),
        "num_cayley_neumann_terms": lambda said: not said.get("use_cayley_neumann"),
        "module_dropout": lambda said: bool(said.get("block_share")),
    },
    "OSF": {"target_svd_config": lambda said: True},  # which nobody reads
    "PSOFT": {
        "psoft_alpha": lambda said: True,  # cancels itself out
        **dict.fromkeys(("psoft_svd_lowrank_niter", "random_seed"), lambda said: said.get("psoft_svd") != "lowrank"),
        "use_cayley_neumann": lambda said: not said.get("psoft_orth", True),
        **dict.fromkeys(
            ("num_cayley_neumann_terms", "cayley_neumann_eps"),
            lambda said: not (said.get("psoft_orth", True) and said.get("use_cayley_neumann")),
        ),
    },
    "PVERA": {"generator_seed": lambda said: True},  # of what is drawn
}
"""Method -> fields that others write although they say nothing there; given here they would be refused."""


def _of_its_age(said: dict[str, Any]) -> None:
    """OFT has meant three things in the field's files.

    Raises:
        ValueError: the file is of the first kind, whose parameters are others.
    """
    if "oft_block_size" not in said:
        raise ValueError(
            "This OFT file was written before peft 0.14, whose rotations have other parameters. Train it anew, or "
            "merge it with peft 0.13."
        )
    said.setdefault("use_cayley_neumann", False)  # came later than files without it
    if said["use_cayley_neumann"] and "peft_version" not in said:  # written since 0.18
        warnings.warn(
            "This OFT file was written before peft 0.18, whose series for Cayley's transform was another one: its "
            "rotations are not quite those that were trained.",
            stacklevel=3,
        )


def _there(names: Sequence[str] | None, base: nn.Module) -> list[str] | None:
    """The field lists every usual name of a head, whether the model has it or not; other names are kept."""
    if not names:
        return None
    paths = [n for n, _ in base.named_modules()]
    found = [n for n in dict.fromkeys(names) if n not in HEADS or any(suffix_match(p, n) for p in paths)]
    return found or None


def without_start(config: PeftConfig) -> PeftConfig:
    """The same adapter, started in the cheapest way and without touching the global generator: values come later."""
    config = config.with_random_start() if isinstance(config, PromptTuningConfig) else config
    return replace_options(config, init_seed=0, init_from=None)
