"""The programs that an adapter can be written for, and what each of them takes."""

from dataclasses import dataclass
from typing import Literal

from ..config import did_you_mean

Form = Literal["folder", "gguf", "mlx", "onnx"]
"""An adapter folder, or a model folder of transformers; a GGUF file; MLX's adapter folder; an ONNX file."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One program. Facts are of November 2026, from the programs' own sources."""

    name: str
    adapter: Form | None = None
    """How an adapter is written for it; None: it takes merged models only."""
    merged: Form | None = None
    """How a merged model is written for it; None: it takes adapters only."""
    own_kinds: bool = False
    """Whether it takes the field's other adapters, too (DoRA, IA3 ...), and LoRA at any layer, with patterns."""
    but_for: tuple[str, ...] = ()
    """Those of them that it gets wrong."""
    virtual: bool = False
    """Whether prompts and prefixes are among those."""
    ends: bool = False
    """Whether it takes a LoRA at the embedding and at the head, where these do not share one weight."""
    most_rank: int | None = None
    """The largest rank that it takes."""
    use: str
    """The line that uses what was written: of {out}, the folder; {base}; {room} for ranks; {file}, the file in it."""
    use_merged: str = ""
    """The same for a merged model."""


_SERVE = "vllm serve {base} --enable-lora --lora-modules adapter={out} --max-lora-rank {room}"
TARGETS = {
    target.name: target
    for target in (
        Target(
            name="peft",
            adapter="folder",
            own_kinds=True,
            virtual=True,
            ends=True,
            use='peft.PeftModel.from_pretrained(base, "{out}")',
        ),
        Target(
            name="transformers",
            adapter="folder",
            merged="folder",
            own_kinds=True,
            but_for=("DORA",),  # 5.23 loads it without its magnitudes
            ends=True,
            use='AutoModelForCausalLM.from_pretrained("{out}")  # peft must be installed',
            use_merged='AutoModelForCausalLM.from_pretrained("{out}")',
        ),
        Target(
            name="vllm",
            adapter="folder",
            merged="folder",
            most_rank=512,
            use=_SERVE,
            use_merged="vllm serve {out}",
        ),
        Target(
            name="tgi",
            adapter="folder",
            merged="folder",
            use="text-generation-launcher --model-id {base} --lora-adapters adapter={out}",
            use_merged="text-generation-launcher --model-id {out}",
        ),
        Target(
            name="llamacpp",
            adapter="gguf",
            merged="gguf",
            ends=True,
            use="llama-cli -m BASE.gguf --lora {file}",
            use_merged="llama-cli -m {file}",
        ),
        Target(
            name="ollama",
            adapter="folder",
            merged="gguf",
            use="ollama create NAME -f {out}/Modelfile",
            use_merged="ollama create NAME -f {out}/Modelfile",
        ),
        Target(
            name="mlx",
            adapter="mlx",
            merged="folder",
            ends=True,
            use="mlx_lm.generate --model {base} --adapter-path {out} --prompt …",
            use_merged="mlx_lm.generate --model {out} --prompt …",
        ),
        Target(name="onnx", merged="onnx", use="", use_merged='onnxruntime.InferenceSession("{file}")'),
    )
}
"""By name."""


def target_named(name: str) -> Target:
    """Raises ValueError where there is none of that name."""
    if name not in TARGETS:
        raise ValueError(f"There is no target {name!r}.{did_you_mean(name, TARGETS)} Known: {', '.join(TARGETS)}.")
    return TARGETS[name]
