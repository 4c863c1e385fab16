"""What a training step holds in memory, for Llamas of 1B, 8B and 70B: full fine-tuning, and adapters beside it.

    python -m benchmarks.memory [--shapes 1B,8B] [--rows 1] [--length 2048] [--checkpointing] [--device cuda]

A step is run on tensors that have shapes and no data, and every byte is counted that is alive: weights, gradients, the
optimiser's state, and what is kept for the backward. On a GPU the same step is then run for real where it fits.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import coadapt
from coadapt import BottleneckConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from coadapt.training.live import Allocated, Live
from coadapt.training.step import Bytes, one_step, settle

from .report import BYTES, machine, markdown, shown
from .setting import checkpointed

SHAPES: Mapping[str, Mapping[str, int]] = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Llama 3's, with 8 key and value heads and 128256 tokens."""

LORA = LoraConfig(r=16, target_modules="all-linear")
PROMPT = PromptTuningConfig(num_virtual_tokens=20)
WAYS: Mapping[str, Mapping[str, PeftConfig]] = {
    "full fine-tuning": {},
    "LoRA r=16, all linears": {"lora": LORA},
    "prompt of 20": {"prompt": PROMPT},
    "prefix of 20": {"prefix": PrefixTuningConfig(num_virtual_tokens=20)},
    "bottleneck (64)": {"bottleneck": BottleneckConfig(bottleneck_size=64)},
    "LoRA + prompt": {"lora": LORA, "prompt": PROMPT},
}
"""The adapters of each; those without any train the whole model."""


def model(shape: Mapping[str, int], way: str, checkpointing: bool) -> Any:
    """Weights in bf16, adapters in fp32; ready to train."""
    usual: dict[str, Any] = {"num_key_value_heads": min(8, shape["num_attention_heads"]), "vocab_size": 128256}
    config = LlamaConfig(**{**usual, **shape}, use_cache=False)
    trained: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if WAYS[way]:
        trained = PeftModel(trained)
        for name, options in WAYS[way].items():
            trained.add_adapter(name, options)
        trained.set_adapter(list(WAYS[way]))
    return (checkpointed(trained) if checkpointing else trained).train()


def one_run(meter: Live | Allocated, make: Callable[[], Any], rows: int, length: int) -> Bytes:
    """A step whose optimiser has its state already."""
    with meter:
        trained = make()
        gc.collect()
        weights = meter.now
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], fused=True)
        settle(optimizer)
        ids = torch.zeros(rows, length, dtype=torch.long)
        return one_step(meter, lambda: trained(input_ids=ids, labels=ids).loss, optimizer, weights=weights)


def counted(shape: Mapping[str, int], way: str, given: argparse.Namespace) -> Bytes:
    """On tensors that have a shape, a dtype and a device, and no data."""
    with torch.device("meta"):  # Module.to fails on what was made in a FakeTensorMode
        empty = model(shape, way, given.checkpointing)

    def make() -> Any:
        empty.to_empty(device="cpu").tie_weights()
        return empty

    with FakeTensorMode(allow_non_fake_inputs=True):
        return one_run(Live(), make, given.rows, given.length)


def measured(shape: Mapping[str, int], way: str, given: argparse.Namespace) -> Bytes:
    """On the GPU, with data."""
    with torch.device("cuda"):
        return one_run(Allocated(), lambda: model(shape, way, given.checkpointing), given.rows, given.length)


def fits(found: Bytes) -> bool:
    gc.collect()
    torch.cuda.empty_cache()
    return found.peak < 0.95 * torch.cuda.mem_get_info()[0]


def line(way: str, found: Bytes, full: Bytes) -> list[str]:
    parts = (found.weights, found.gradients, found.optimizer, found.activations, found.peak)
    return [way, *(shown(n, BYTES) for n in parts), f"{1 - found.peak / full.peak:.0%}"]


def table(shape: str, given: argparse.Namespace) -> str:
    """One row for each way; on a GPU a second one, of the real step, where the count says that it fits."""
    lines: list[list[str]] = []
    full: dict[str, Bytes] = {}
    for way in WAYS:
        found = counted(SHAPES[shape], way, given)
        lines.append(line(way, found, full.setdefault("counted", found)))
        if given.device == "cuda" and fits(found):
            real = measured(SHAPES[shape], way, given)
            lines.append(line(f"{way}, on the GPU", real, full.setdefault("real", full["counted"])))
    head = ["way", "weights", "gradients", "optimiser", "activations", "peak", "saved"]
    return f"## {shape}\n\n{markdown(head, lines)}\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=lambda told: told.split(","), default=list(SHAPES), help="1B,8B,70B")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens in a row")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    if unknown := [shape for shape in given.shapes if shape not in SHAPES]:
        parser.error(f"--shapes {','.join(unknown)}: there are {', '.join(SHAPES)}.")
    parts = [
        f"# Memory of a training step, {date.today()}\n",
        f"`{' '.join(['python -m benchmarks.memory', *arguments])}` with coadapt {coadapt.__version__}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, on {machine(given.device)}. Llamas in bf16, "
        f"adapters in fp32, {given.rows} x {given.length} tokens, gradient checkpointing "
        f"{'on' if given.checkpointing else 'off'}, AdamW whose state has the dtype of what it trains. Counted on "
        "tensors without data. Saved: of full fine-tuning's peak.\n",
        *(table(shape, given) for shape in given.shapes),
    ]
    text = "\n".join(parts)
    given.out.mkdir(parents=True, exist_ok=True)
    kind = [given.device, *(["checkpointing"] if given.checkpointing else [])]
    (given.out / f"{'-'.join(['memory', str(date.today()), *kind])}.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
