"""Tokens a second of the serving engine: beside transformers' own continuous batching, and with adapters.

    python -m benchmarks.serving [--model DIR] [--requests 64] [--rounds 3]

One thread, no HTTP. Prompts and answers have unequal lengths, the same in all candidates; no answer ends early. Seconds
are those of the processor, in this process: what else a machine does counts for little.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from coadapt import LoraConfig, PeftModel
from coadapt.demo import BASE
from coadapt.serving.engine import Engine
from coadapt.serving.request import Piece, Request

ADAPTERS = 32
TEXT = (
    "Once upon a time there was a little girl who had a red ball. She went to the park with her mother and saw a dog."
)


def unequal(count: int, tokenizer: Any) -> list[tuple[tuple[int, ...], int]]:
    """Prompts of 4 to 27 tokens and the lengths of their answers, 8 to 95, in no order."""
    ids = tokenizer(TEXT).input_ids
    return [(tuple(ids[: 4 + (7 * i) % 24]), 8 + (37 * i) % 88) for i in range(count)]


def engine_of(view: PeftModel, tokenizer: Any, rows: int) -> Engine:
    made = Engine(view, tokenizer, rows=rows, queue=10_000, loaded=ADAPTERS + 8)
    made.writer.ends = frozenset()  # so that all candidates write as many tokens
    return made


def ours(view: PeftModel, tokenizer: Any, asked: Sequence[Any], names: Sequence[str | None], rows: int) -> int:
    """Answers all; how many tokens they have."""
    made, tokens = engine_of(view, tokenizer, rows), [0] * len(asked)

    def hear(piece: Piece, i: int) -> None:
        assert piece.error is None, piece.error
        tokens[i] = piece.tokens

    for i, (prompt, most) in enumerate(asked):
        request = Request(tokens=prompt, adapters=names[i % len(names)], max_tokens=most, temperature=0)
        made.submit(request, lambda piece, i=i: hear(piece, i))
    made.start()
    made.stop()
    return sum(tokens)


def theirs(model: Any, asked: Sequence[Any], rows: int) -> int:
    """The same of the base by transformers' continuous batching, with a bounded cache; how many tokens."""
    cache = ContinuousBatchingConfig(
        page_size=32, num_blocks=8 * rows, max_batch_tokens=256, max_requests_per_batch=rows, use_cuda_graph=False
    )
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=128)
    total = left = 0
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=cache, warmup=False, block=True, timeout=30
    ) as manager:
        for prompt, most in asked:
            manager.add_request(list(prompt), max_new_tokens=most)
            left += 1
        while left:
            found = manager.get_result(timeout=1)
            if found is not None and found.is_finished():
                assert found.error is None, found.error
                total, left = total + len(found.generated_tokens), left - 1
            elif found is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended before its requests did.")
    return total


def per_second(candidates: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens a second of each, the median of the rounds; candidates take turns."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            begun = time.process_time()
            tokens = run()
            found[name].append(tokens / (time.process_time() - begun))
    return {name: statistics.median(values) for name, values in found.items()}


def candidates(
    base: Any, view: PeftModel, tokenizer: Any, asked: Sequence[Any], rows: int
) -> dict[str, Callable[[], int]]:
    """What is measured with so many rows."""
    many = [f"a{i}" for i in range(ADAPTERS)]
    return {
        "transformers, base": lambda: theirs(base, asked, rows),
        "coadapt, base": lambda: ours(view, tokenizer, asked, [None], rows),
        "coadapt, one adapter": lambda: ours(view, tokenizer, asked, ["a0"], rows),
        f"coadapt, {ADAPTERS} adapters": lambda: ours(view, tokenizer, asked, many, rows),
    }


def stalls(view: PeftModel, tokenizer: Any, folders: Sequence[Path]) -> tuple[float, float, float]:
    """Seconds between two steps of 16 rows: the median, the longest, and the longest while adapters come."""
    made, times = engine_of(view, tokenizer, 17), list[float]()
    prompt = tuple(tokenizer(TEXT).input_ids[:8])
    for i in range(16):
        request = Request(tokens=prompt, adapters=f"a{i}", max_tokens=200, temperature=0)
        made.submit(request, (lambda piece: times.append(time.perf_counter())) if i == 0 else (lambda piece: None))
    made.start()
    while len(times) < 80:
        time.sleep(0.001)
    quiet = [b - a for a, b in itertools.pairwise(times[20:])]
    at = len(times)
    for i, folder in enumerate(folders):
        made.load(f"new{i}", folder)
    busy = [b - a for a, b in itertools.pairwise(times[at - 1 :])]
    made.stop()
    return statistics.median(quiet), max(quiet), max(busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(told.model)
    base, other = (AutoModelForCausalLM.from_pretrained(told.model, dtype=torch.float32).eval() for _ in range(2))
    view = PeftModel(base)
    for i in range(ADAPTERS):
        view.add_adapter(f"a{i}", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    view.requires_grad_(False)
    asked = unequal(told.requests, tokenizer)
    table = Table("tokens a second", "1 row", "8 rows", "32 rows", title=f"{told.requests} requests, {told.model}")
    figures = [
        per_second(candidates(other, view, tokenizer, asked[: max(told.requests * rows // 32, 4)], rows), told.rounds)
        for rows in (1, 8, 32)
    ]
    for name in figures[0]:
        table.add_row(name, *(f"{found[name]:.0f}" for found in figures))
    Console().print(table)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(4):
            one = PeftModel(AutoModelForCausalLM.from_pretrained(told.model, dtype=torch.float32), LoraConfig(r=8))
            one.save_pretrained(Path(folder, str(i)))
        usual, longest, loading = stalls(view, tokenizer, [Path(folder, str(i)) for i in range(4)])
    Console().print(
        f"Between two steps of 16 rows with 16 adapters: {usual * 1000:.1f} ms, at most {longest * 1000:.1f} ms; "
        f"at most {loading * 1000:.1f} ms while 4 adapters are loaded."
    )


if __name__ == "__main__":
    main()
