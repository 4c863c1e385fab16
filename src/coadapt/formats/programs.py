"""Which programs load an adapter folder: one row a program. The facts are from their own sources, of November 2026.

What is judged is the adapter. Whether a program runs the base itself is its own list of models.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..core.adapter import ModuleCopy
from ..core.method import METHODS, WeightMethod
from . import names
from .configs import PEFT_VERSION, READABLE
from .facts import Facts

TRANSFORMERS_VERSION = "5.23"
"""Whose loader the row of transformers is about."""
PEFT_TYPES = frozenset(
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING LORA ADALORA ADAMSS BOFT ADAPTION_PROMPT IA3 BEFT "
    "LILY LOHA LOKR OFT POLY LN_TUNING VERA FROD PVERA FOURIERFT GLORA XLORA HRA VBLORA UNILORA CPT MISS RANDLORA ROAD "
    "TRAINABLE_TOKENS HIRA SHIRA C3A WAVEFT OSF DELORA GRALORA CARTRIDGE TINYLORA PSOFT PEANUT SHADOW SUPERTUNING "
    "DEFT".split()
)
"""What the field's library, at PEFT_VERSION, knows."""
NOT_INJECTED = frozenset(
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING CPT CARTRIDGE ADAPTION_PROMPT SHADOW".split()
)
"""What transformers refuses, since it is no part of a layer."""
VLLM_RANK, VLLM_RANKS = 16, (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
VLLM_HEADS = ("classifier", "score")
OLLAMA_BASES = ("llama", "gemma2")
AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
LORA_KEY = re.compile(r"\.lora_[AB]\.weight$")
NORM_KEY = re.compile(r"(_layernorm|\.norm|_norm|layer_norm)[^.]*\.weight$")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a program loads an adapter as it is."""

    program: str
    reasons: Sequence[str]
    """Why it does not; none where it does."""
    command: str | None
    """What loads it, or what mends the no; None where nothing does."""

    @property
    def loads(self) -> bool:
        """Yes or no."""
        return not self.reasons


BECOME_LORA = ("LORA", "DORA", "IA3", "BD_LORA", "QA_LORA", "KASA", "LOFTQ", "MONTECLORA", "VELORA")
"""What `coadapt export` writes as a plain LoRA, exactly or as the best of a rank."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program."""

    name: str
    target: str
    """Its name in `coadapt export --for`."""
    refuses: Callable[[Facts], Iterator[str]]
    """What it refuses of an adapter, or gets wrong."""
    use: Callable[[Facts], str]
    """The line that loads what it takes."""
    own_kinds: bool = False
    """Whether it takes the field's other methods, too."""
    ends: bool = False
    """Whether what export writes for it may adapt the embedding and the head."""

    def judge(self, facts: Facts) -> Verdict:
        """Yes or no, why, and what helps."""
        reasons = [*_as_checkpoint(facts), *self.refuses(facts)]
        command = self.use(facts) if not reasons else self._remedy(facts, reasons)
        return Verdict(program=self.name, reasons=reasons, command=command)

    def _remedy(self, facts: Facts, reasons: Sequence[str]) -> str | None:
        which = f" --adapters {shlex.quote(facts.name)}" if facts.form == "checkpoint" else ""
        export = f"coadapt export {_quoted(facts)} --for {self.target}{which}"
        if facts.config.get("layer_replication"):
            return f"coadapt merge --adapter {_quoted(facts)}{which} --out MERGED"
        if self.own_kinds:
            if list(reasons) == [*_as_checkpoint(facts)]:
                return export
            return f"coadapt merge --adapter {_quoted(facts)}{which} --out MERGED" if mergeable(facts) else None
        if not mergeable(facts):
            return None
        if self.name == "vLLM" and all(reason.startswith("rank") for reason in reasons):
            rank = max(facts.ranks)
            room = next((room for room in VLLM_RANKS if room >= rank), None)
            return f"{export} --r {VLLM_RANKS[-1]}" if room is None else _vllm(facts, room)
        becomes_lora = facts.kind in BECOME_LORA and not [*_beyond(facts, self.ends)]
        return export if becomes_lora else f"{export} --merged"


def mergeable(facts: Facts) -> bool:
    """Whether a merged model can hold it: it changes weights, in a way that coadapt reads."""
    return facts.kind in METHODS and issubclass(METHODS[facts.kind], WeightMethod | ModuleCopy)


def vllm_room(facts: Facts) -> int | None:
    """The `--max-lora-rank` with which vLLM takes it as it is; None where it does not."""
    reasons = [*_as_checkpoint(facts), *_vllm_refuses(facts)]
    if not all(reason.startswith("rank") for reason in reasons):
        return None
    return next((room for room in VLLM_RANKS if room >= max(*facts.ranks, VLLM_RANK)), None)


# ---- what programs find ----------------------------------------------------------------------------------------------


def _as_checkpoint(facts: Facts) -> Iterator[str]:
    if facts.form == "checkpoint":
        yield "this is a checkpoint of transformers' Trainer, which only coadapt reads"


def _peft(facts: Facts) -> Iterator[str]:
    if str(facts.config.get("peft_type")) not in PEFT_TYPES:
        yield f"peft {PEFT_VERSION} has no {facts.config.get('peft_type')}"
    elif facts.config.get(READABLE) is False:
        yield "it has a form that peft has no file for, and would get wrong"


def _transformers(facts: Facts) -> Iterator[str]:
    yield from _peft(facts)
    if facts.kind in NOT_INJECTED:
        yield "it puts adapters into layers, and takes no prompts or prefixes"
    if facts.kind == "POLY":
        yield "it hands no task_ids on"
    if facts.kind == "ALORA":
        yield "it does not look for the invocation, so the adapter is never active"
    if facts.kind in names.SHARED and facts.kind != "RANDLORA":  # whose bases it makes again
        yield f"transformers {TRANSFORMERS_VERSION} loads nothing that layers share"
    if facts.kind == "DORA":
        yield f"transformers {TRANSFORMERS_VERSION} loads DoRA without its magnitudes"


def _only_lora(facts: Facts) -> Iterator[str]:
    if facts.kind == "DORA":
        yield "it takes no DoRA"
    elif facts.kind != "LORA":
        yield f"it takes LoRA only, and this is {facts.kind}"
    elif facts.config.get("layer_replication"):
        yield "it does not repeat blocks of the base (layer_replication)"


def _beyond(facts: Facts, ends: bool = False) -> Iterator[str]:
    """What a LoRA can hold besides factors at linear layers; `ends`: at embedding and head they count as such."""
    if (bias := facts.config.get("bias", "none")) not in (None, "none"):
        yield f"biases were trained along (bias={bias})"
    if facts.config.get("lora_bias"):
        yield "B has biases (lora_bias)"
    if saved := facts.config.get("modules_to_save"):
        yield f"whole modules were trained along ({', '.join(saved)})"
    if facts.config.get("target_parameters"):
        yield "it adapts raw expert parameters"
    if facts.config.get("trainable_token_indices"):
        yield "single tokens were trained along"
    keys = facts.tensors
    if not ends and any("lora_embedding_" in key or re.search(r"\b(lm_head|embed_out)\.lora_", key) for key in keys):
        yield "it adapts the embedding or the head"
    if any(LORA_KEY.search(key) and len(shape) > 2 for key, shape in keys.items()):
        yield "it adapts convolutions"
    if any(key.endswith((".base_layer.weight", "embed_tokens.weight")) for key in keys):
        yield "it brings an embedding, as of a resized vocabulary"


def _vllm_refuses(facts: Facts) -> Iterator[str]:
    if others := [*_only_lora(facts)]:
        yield from others
        return
    heads = facts.config.get("modules_to_save") or ()
    yield from (why for why in _beyond(facts) if not (why.startswith("whole modules") and set(heads) <= {*VLLM_HEADS}))
    start = facts.config.get("init_lora_weights")
    if isinstance(start, str) and start not in VLLM_STARTS:
        yield f"init_lora_weights={start!r} is none that it knows"
    if (rank := max(facts.ranks)) > VLLM_RANK:
        yield f"rank {rank} is over its --max-lora-rank, {VLLM_RANK} if nothing is said (at most {VLLM_RANKS[-1]})"


def _tgi(facts: Facts) -> Iterator[str]:
    if others := [*_only_lora(facts)]:
        yield from others
        return
    yield from _beyond(facts)
    yield from _patterns(facts, "rank_pattern", "alpha_pattern")
    counts: dict[str, set[int]] = {}
    for key in facts.tensors:
        if found := re.search(r"\.(\d+)\.(.+)\.lora_A\.weight$", key):
            counts.setdefault(found[2], set()).add(int(found[1]))
    known = (facts.base or {}).get("num_hidden_layers") or 1 + max((max(at) for at in counts.values()), default=-1)
    if partly := sorted(kind for kind, at in counts.items() if len(at) < known):
        yield f"it skips what is not adapted in all {known} layers ({', '.join(partly)})"


def _llamacpp(facts: Facts) -> Iterator[str]:
    if others := [*_only_lora(facts)]:
        yield from others
        return
    yield from _beyond(facts)
    if facts.config.get("use_rslora"):
        yield "it ignores rsLoRA, and would scale by alpha / r"
    yield from _patterns(facts, "alpha_pattern")
    if strange := [k for k in facts.tensors if not LORA_KEY.search(k) and not NORM_KEY.search(k)]:
        if not [*_beyond(facts)]:
            yield f"its converter stops at any tensor but lora_A and lora_B ({strange[0]})"


def _ollama(facts: Facts) -> Iterator[str]:
    if others := [*_only_lora(facts)]:
        yield from others
        return
    yield from _beyond(facts)
    kind = (facts.base or {}).get("model_type")
    if kind is None:
        yield f"it takes folders for {' and '.join(OLLAMA_BASES)} only, and the base is not at hand here (--model)"
    elif kind not in OLLAMA_BASES:
        yield f"it takes folders for {' and '.join(OLLAMA_BASES)} only, and the base is a {kind}"
    if not isinstance(facts.config.get("lora_alpha", 8), int):
        yield f"lora_alpha={facts.config['lora_alpha']} is no whole number"
    if facts.config.get("use_rslora"):
        yield "it ignores rsLoRA"
    yield from _patterns(facts, "rank_pattern", "alpha_pattern")


def _mlx(facts: Facts) -> Iterator[str]:
    yield from _only_lora(facts)
    yield "it reads a layout of its own (adapters.safetensors), not this one"


def _patterns(facts: Facts, *names: str) -> Iterator[str]:
    if given := [name for name in names if facts.config.get(name)]:
        yield f"it ignores {' and '.join(given)}"


# ---- what loads it ---------------------------------------------------------------------------------------------------


def _quoted(facts: Facts) -> str:
    return shlex.quote(str(facts.folder))


def _vllm(facts: Facts, room: int = VLLM_RANK) -> str:
    rank = f" --max-lora-rank {room}" if room > VLLM_RANK else ""
    return f"vllm serve {shlex.quote(facts.base_name)} --enable-lora --lora-modules {facts.name}={_quoted(facts)}{rank}"


def _from_pretrained(facts: Facts) -> str:
    if facts.config.get("base_model_name_or_path"):
        auto = AUTO.get(str(facts.config.get("task_type")), "AutoModel")
        return f'{auto}.from_pretrained("{facts.folder}")'
    return f'base.load_adapter("{facts.folder}")'


PROGRAMS = (
    Program(
        name="transformers",
        target="transformers",
        refuses=_transformers,
        use=_from_pretrained,
        own_kinds=True,
    ),
    Program(
        name="peft",
        target="peft",
        refuses=_peft,
        use=lambda facts: f'peft.PeftModel.from_pretrained(base, "{facts.folder}")',
        own_kinds=True,
    ),
    Program(name="vLLM", target="vllm", refuses=_vllm_refuses, use=_vllm),
    Program(
        name="TGI",
        target="tgi",
        refuses=_tgi,
        use=lambda facts: (
            f"text-generation-launcher --model-id {shlex.quote(facts.base_name)} "
            f"--lora-adapters {facts.name}={_quoted(facts)}"
        ),
    ),
    Program(
        name="llama.cpp",
        target="llamacpp",
        refuses=_llamacpp,
        use=lambda facts: f"python convert_lora_to_gguf.py --base {shlex.quote(facts.base_name)} {_quoted(facts)}",
        ends=True,
    ),
    Program(
        name="Ollama",
        target="ollama",
        refuses=_ollama,
        use=lambda facts: f"ADAPTER {facts.folder} in a Modelfile, then: ollama create {facts.name} -f Modelfile",
    ),
    Program(name="MLX", target="mlx", refuses=_mlx, use=lambda facts: "", ends=True),
)
"""Those that are asked about."""
