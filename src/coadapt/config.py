"""What an adapter is asked to be: the fields every method has, their validation, plain dicts. Needs no torch."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from .naming import check_name


class TaskType(StrEnum):
    """What the adapted model is for; decides which newly made heads are trained along."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_KINDS = sorted(
    kind
    for file in (Path(__file__).parent / "methods").glob("*.py")
    for kind in re.findall(r'^    kind = "(\w+)"$', file.read_text("utf-8"), re.MULTILINE)
)
PeftType = StrEnum("PeftType", [(kind, kind) for kind in _KINDS])
"""The methods, by the names that adapter folders carry; read from their sources, since importing them needs torch."""
_kinds: Mapping[str, StrEnum] = {str(kind): kind for kind in cast(Iterable[StrEnum], PeftType)}

CONFIGS: dict[str, type["PeftConfig"]] = {}
"""Every method's configuration class by its `peft_type`; filled as the files of `methods/` are imported."""


def nearest(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """The known words that look most like `word`, best first; those that it ends in or that end in it come first."""
    choices = sorted(set(known))
    inside = [c for c in choices if word and (word in c or c in word)]
    close = difflib.get_close_matches(word, choices, n=most, cutoff=0.5)
    return list(dict.fromkeys([*close, *inside]))[:most]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known words, or nothing."""
    found = nearest(word, known)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The options that every method has. A method's own class adds its own, with the names of the field's files.

    Raises:
        TypeError: an option that this method does not have (the nearest name is told).
        ValueError: a value out of its range, or two options that contradict each other.
    """

    kind: ClassVar[str | None] = None
    """The method's name, as `peft_type` in adapter files."""
    foreign: ClassVar[Mapping[str, Any]] = {}
    """Fields of other programs' files that this method does not read, with the value at which they mean nothing."""
    unread: ClassVar[Mapping[str, str]] = {}
    """Options that the field has and this method does not -> why, or what is there instead."""

    peft_type: str | None = None
    """A check: the method that this configuration must be of. Left out, it is found."""
    task_type: str | None = None
    """One of `TaskType`: SEQ_CLS and TOKEN_CLS train the newly made classification head along."""
    base_model_name_or_path: str | None = None
    """Where the base came from: a hub id or a folder. Written by coadapt when an adapter is saved."""
    revision: str | None = None
    """The hub revision of the base."""
    inference_mode: bool = False
    """True: the adapter is attached frozen."""
    modules_to_save: Sequence[str] | None = None
    """Names of modules that get a full, trained copy inside the adapter (a new head, say)."""
    adapter_name: str | None = None
    """The adapter's name in the model; never written to disk."""
    init_from: str | None = None
    """Start from the weights of this attached adapter, which must be of the same shape."""
    init_seed: int | None = None
    """Seed of the random start; left out, the global generator is used."""

    def __new__(cls, **options: Any) -> Self:
        known = [f.name for f in fields(cls)]
        for option in options:
            if option not in known and option in cls.unread:
                raise TypeError(f"{cls.__name__} does not read {option!r}, an option of peft's: {cls.unread[option]}.")
            if option not in known:
                raise TypeError(
                    f"{cls.__name__} has no option {option!r}.{did_you_mean(option, known)} "
                    f"It reads: {', '.join(known)}."
                )
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            CONFIGS[str(cls.kind)] = cls

    def __post_init__(self) -> None:
        own = None if self.kind is None else str(self.kind)
        if self.peft_type is not None and own is not None and str(self.peft_type) != own:
            raise ValueError(
                f"{type(self).__name__} is of type {own}, but peft_type={str(self.peft_type)!r} was given."
            )
        object.__setattr__(self, "peft_type", _kinds.get(str(own or self.peft_type), own or self.peft_type))
        if self.task_type is not None and str(self.task_type) not in TaskType.__members__:
            raise ValueError(
                f"task_type={self.task_type!r} is unknown.{did_you_mean(str(self.task_type), TaskType.__members__)} "
                f"Known: {', '.join(TaskType)}."
            )
        if self.adapter_name is not None:
            check_name(self.adapter_name)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save is a list of names; {self.modules_to_save!r} is one string.")

    @property
    def method(self) -> str:
        """The name of the method that this builds: `peft_type`, but for variants (a LoRA with `use_dora` is DORA)."""
        return str(self.peft_type)

    @property
    def is_prompt_learning(self) -> bool:
        """Whether it describes virtual tokens: prompts, and prefixes."""
        return isinstance(self, VirtualTokensConfig)

    def for_inference(self) -> Self:
        """The same adapter without what only training needs (an encoder that makes its parameters), if it has that."""
        return self

    def positive(self, *names: str) -> None:
        """Refuses fields that are not whole numbers of at least 1 (None passes)."""
        for name in names:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{type(self).__name__}: {name}={value!r} must be a whole number of at least 1.")

    def numbers(self, *names: str) -> None:
        """Refuses mappings whose values are not whole numbers of at least 1."""
        for name in names:
            for key, value in getattr(self, name).items():
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    who = f"{type(self).__name__}: {name}[{key!r}]"
                    raise ValueError(f"{who}={value!r} must be a whole number of at least 1.")

    def above_zero(self, *names: str) -> None:
        """Refuses numbers that are not above 0 (None passes)."""
        for name in names:
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{type(self).__name__}: {name}={value} must be above 0.")

    def no_effect(self, name: str, where: object, why: str) -> None:
        """Refuses a field that is not at its default `where` nothing reads it: "<name> has no effect <why>."."""
        own = next(f for f in fields(self) if f.name == name)
        default = own.default_factory() if own.default_factory is not MISSING else own.default
        if where and getattr(self, name) != default:
            raise ValueError(f"{type(self).__name__}: {name} has no effect {why}.")

    def probability(self, *names: str) -> None:
        """Refuses fields outside of [0, 1)."""
        for name in names:
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{type(self).__name__}: {name}={value!r} must lie in [0, 1).")

    def choice(self, name: str, allowed: Sequence[Any]) -> None:
        """Refuses a field whose value is none of `allowed`."""
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(
                f"{type(self).__name__}: {name}={value!r} is not one of {', '.join(map(repr, allowed))}."
                + did_you_mean(str(value), [str(a) for a in allowed])
            )

    def restates(self, **facts: int) -> None:
        """Refuses a field that is given and says other than the model does: `restates(token_dim=768)`."""
        for name, needed in facts.items():
            given = getattr(self, name)
            if given is not None and given != needed:
                raise ValueError(
                    f"{type(self).__name__}: {name}={given!r} does not fit this model, which needs {needed}. "
                    f"Give {needed}, or leave it out: it is found."
                )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, but for `adapter_name`, which belongs to the model and not to the file."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "adapter_name"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PeftConfig":
        """A configuration of the class that `values["peft_type"]` names.

        Fields of other programs pass where they stand at their default.

        Raises:
            ValueError: an unknown method, or a field that would change the result and is not read here.
        """
        kind = str(values.get("peft_type"))
        if kind not in CONFIGS:
            raise ValueError(
                f"peft_type={kind!r} is not known here.{did_you_mean(kind, CONFIGS)} Known: {', '.join(CONFIGS)}."
            )
        target = CONFIGS[kind]
        if not issubclass(target, cls):
            raise ValueError(
                f"This configuration is of type {kind}, which {cls.__name__} does not read; use PeftConfig."
            )
        known = {f.name for f in fields(target)}
        lost = {
            k: v
            for k, v in values.items()
            if k not in known
            and k not in _NOTES
            and v not in (None, False, {}, [], "")
            and target.foreign.get(k, MISSING) != v
        }
        if lost:
            raise ValueError(
                f"This {kind} file sets {', '.join(f'{k}={v!r}' for k, v in lost.items())}, which coadapt does "
                "not read; leaving it out would give other results. Remove it only if you know that it had no effect."
                + "".join(f" {k}: {target.unread[k]}." for k in lost if k in target.unread)
            )
        return target(**{k: v for k, v in values.items() if k in known})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None) -> "PeftConfig":
        """Reads `adapter_config.json` from a local adapter folder.

        Raises:
            FileNotFoundError: the folder holds no adapter.
            ValueError: the file is not a configuration that coadapt reads.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        file = folder / "adapter_config.json"
        if not file.is_file():
            there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder} holds no adapter: adapter_config.json is missing (found: {there}).")
        try:
            values = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a {type(values).__name__}, not the fields of a configuration.")
        return cls.from_dict(cast(dict[str, Any], values))


_NOTES = frozenset({"peft_version", "auto_mapping", "coadapt_version", "base_fingerprint", "transformers_version"})
"""What files say about themselves; read by nobody."""


@dataclass(frozen=True, kw_only=True)
class TargetedConfig(PeftConfig):
    """Options of the methods that sit at modules which the user can choose."""

    patterns: ClassVar[Sequence[str]] = ()
    """Its fields that say otherwise for some layers: end of a module's name, or a regular expression -> value."""

    target_modules: Sequence[str] | str | None = None
    """Last parts of module names (`["q_proj", "mlp.up_proj"]`), a regular expression that matches whole names, or words
    for parts of a model: `"all-linear"`, `"attention"`, `"mlp"`, `"experts"`, `"shared_experts"`, `"router"`, `"ssm"`,
    `"embeddings"`, `"head"`. Left out, the method's usual places are found from the model's structure."""
    exclude_modules: Sequence[str] | str | None = None
    """Names or a regular expression, as in `target_modules`, of modules to leave out."""
    layers_to_transform: Sequence[int] | int | None = None
    """Only these layers, counted from 0."""
    layers_pattern: Sequence[str] | str | None = None
    """The name of the list of layers (`layers`, `h`), where a model has several."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"{type(self).__name__}: layers_pattern has no effect without layers_to_transform.")
        if isinstance(self.target_modules, Sequence) and not self.target_modules:
            raise ValueError(
                f"{type(self).__name__}: target_modules is empty; leave it out to use the method's usual places."
            )


@dataclass(frozen=True, kw_only=True)
class WeightConfig(TargetedConfig):
    """Options of the methods that are maps of a weight, whosever that is."""

    target_parameters: Sequence[str] | None = None
    """Ends of the names of parameters that are no layer's weight: fused experts (`mlp.experts.down_proj`), each of them
    adapted for itself, or a router's matrix (`mlp.gate.weight`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_parameters is not None:
            if isinstance(self.target_parameters, str) or not self.target_parameters:
                raise ValueError(
                    f"{type(self).__name__}: target_parameters is a list of at least one name; got "
                    f"{self.target_parameters!r}."
                )
            self.without_input(", ".join(self.target_parameters))

    def without_input(self, where: str) -> None:
        """Refuses what has no effect on parameters, which nothing goes into but the model's own code."""
        if idle := [f.name for f in fields(self) if "dropout" in f.name and getattr(self, f.name)]:
            raise ValueError(
                f"{type(self).__name__}: {' and '.join(idle)} would have no effect on {where}: a parameter has no "
                "input or output of its own to drop. Set it to 0; put layers that need it into another adapter."
            )


@dataclass(frozen=True, kw_only=True)
class RankedConfig(WeightConfig):
    """Options of the methods that can have another rank, and another scale, at some of their targets."""

    patterns = ("rank_pattern", "alpha_pattern")

    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    """Other ranks for some layers: end of a module's name, or a regular expression for it -> rank."""
    alpha_pattern: Mapping[str, int | float] = field(default_factory=dict[str, int | float])
    """Other alphas for some layers, in the same way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.numbers("rank_pattern")


@dataclass(frozen=True, kw_only=True)
class TyingConfig(RankedConfig):
    """Options of the methods that can change tied layers as one."""

    ensure_weight_tying: bool = False
    """Layers with one weight (an embedding, and a head that is tied to it) get one change, or one copy, where
    `target_modules`, `modules_to_save` or tokens that are trained name any of them."""


@dataclass(frozen=True, kw_only=True)
class LycorisConfig(RankedConfig):
    """Options of the methods that come from LyCORIS: changes that are products of products."""

    r: int = 8
    """Rank of each product of two matrices."""
    alpha: int | float = 8
    """Scale of the change: it is multiplied by alpha / r."""
    rank_dropout: float = 0.0
    """Share of the output features that go without the change while training."""
    module_dropout: float = 0.0
    """How often a whole layer goes without its change while training."""
    use_effective_conv2d: bool = False
    """Kernels of more than one entry as a core tensor between two matrices (FedPara's proposition 3); otherwise they
    are taken as a matrix (O, I K)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("r")
        self.probability("rank_dropout", "module_dropout")


@dataclass(frozen=True, kw_only=True)
class TransposedConfig(TargetedConfig):
    """An option of the methods whose files say how the layers store their weights."""

    fan_in_fan_out: bool = False
    """A check: True is refused where no target stores its weight transposed, as GPT-2's Conv1D does."""


@dataclass(frozen=True, kw_only=True)
class TokensConfig(TargetedConfig):
    """An option of the methods that can train embeddings of tokens along."""

    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    """Tokens whose embeddings are trained along, of a tied head too; for other layers than the input embedding
    {module name: tokens}."""


@dataclass(frozen=True, kw_only=True)
class BiasConfig(WeightConfig):
    """An option of the methods that can train biases along."""

    only: ClassVar[str | None] = None
    """What the field calls "<method>_only", where that is another name."""

    bias: str = "none"
    """Biases to train along: "none", "<method>_only" ("vera_only", of the targeted layers), or "all"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name in (self.only, f"{str(self.kind).lower()}_only") if name is not None]
        self.choice("bias", ("none", *dict.fromkeys(names), "all"))


@dataclass(frozen=True, kw_only=True)
class VirtualTokensConfig(PeftConfig):
    """Options of the methods that train virtual tokens: prompts, and prefixes. The checks are left out as a rule."""

    num_virtual_tokens: int
    """N, how many."""
    token_dim: int | None = None
    """A check: the width of the model's embeddings; for a prefix also that of the keys of one layer."""
    num_transformer_submodules: int | None = None
    """A check: 2 for an encoder-decoder, 1 otherwise."""
    num_attention_heads: int | None = None
    """A check: the model's attention heads; for a prefix also its key and value heads."""
    num_layers: int | None = None
    """A check: the model's layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("num_virtual_tokens")


@dataclass(frozen=True, kw_only=True)
class InputConfig(VirtualTokensConfig):
    """Options of the methods whose virtual tokens stand in front of the embedded input."""

    prompt_sites: Sequence[str] | None = None
    """For encoder-decoders: in front of the "encoder"'s input (as published; the default), the "decoder"'s, or both."""
    output_virtual_tokens: bool = False
    """Also return the virtual tokens' states; otherwise the output is as long as the input."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(VirtualTokensConfig):
    """Options of the methods whose virtual tokens stand among the keys and values of attention."""

    prefix_sites: Sequence[str] | None = None
    """Any of "encoder", "decoder" (self-attention) and "cross"; all that the model has, if left out."""
    position_offset: int | None = None
    """By how much the input's positions are shifted: N if left out, as the field's files assume. 0 suits stacks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_offset is not None and self.position_offset < 0:
            raise ValueError(f"{type(self).__name__}: position_offset={self.position_offset} must not be below 0.")


def _plain(value: Any) -> Any:
    match value:
        case StrEnum():
            return str(value)
        case Path():
            return str(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        case Mapping():
            return {str(k): _plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
        case list() | tuple():
            return [_plain(v) for v in cast(Sequence[Any], value)]
        case set() | frozenset():
            return sorted(_plain(v) for v in cast(set[Any], value))
        case _:
            return value
