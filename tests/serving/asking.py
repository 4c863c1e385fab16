"""Small models with adapters of every kind, requests to them, and what is heard."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from byte_tokenizer import byte_tokenizer
from coadapt import (
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from coadapt.serving.engine import Engine
from coadapt.serving.request import Piece, Request
from laws.setting import MAKE
from models import stir

TOKENIZER = byte_tokenizer()
FIRST = 5
"""Tokens from here on are bytes."""


def mistral(**options: Any) -> Any:
    """A sliding window in every layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"num_key_value_heads": 2, "sliding_window": 6, "eos_token_id": 2, **options}
    return MistralForCausalLM(MistralConfig(**sizes, **own)).eval().requires_grad_(False)


def base(model: str) -> Any:
    """A model whose next token depends on all before it, with a token for each byte."""
    spread: dict[str, Any] = {"initializer_range": 0.1 if model == "bloom" else 0.3}
    if model == "opt":
        spread = {"init_std": 0.3}
    make = mistral if model == "mistral" else MAKE[model]
    return make(vocab_size=len(TOKENIZER), tie_word_embeddings=False, **spread)


CONFIGS: dict[str, Any] = {
    "short": PromptTuningConfig(num_virtual_tokens=2),
    "long": PromptTuningConfig(num_virtual_tokens=5),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "unmoved": PrefixTuningConfig(num_virtual_tokens=4, position_offset=0),
    "apart": PrefixTuningConfig(num_virtual_tokens=2, prefix_type="decoupled"),
    "lora": LoraConfig(r=4),
    "wide": LoraConfig(r=2, target_modules="attention"),
    "bottleneck": BottleneckConfig(),
    "ia3": IA3Config(),
}
PREFIXES = ("prefix", "unmoved", "apart")
NODES = [
    None, *CONFIGS, "short + prefix", "short >> long", "long >> lora", "lora + 0.5*wide", "prefix >> lora",
    "bottleneck >> lora", "ia3 >> bottleneck", "lora >> ia3", "2*wide >> long",
]  # fmt: skip


def several(model: str) -> PeftModel:
    """Adapters of every kind, none of them at its start."""
    view = PeftModel(base(model))
    for i, (name, config) in enumerate(CONFIGS.items()):
        if model == "bloom" and name in PREFIXES:
            continue
        torch.manual_seed(i)
        view.add_adapter(name, config)
        stir(view.get_adapter(name), seed=i, by=0.3)
    view.requires_grad_(False)
    return view.eval()


def nodes(model: str) -> list[str | None]:
    """Compositions that there are on such a model."""
    return [n for n in NODES if n is None or model != "bloom" or not any(p in n for p in PREFIXES)]


class Heard:
    """The pieces of one answer."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()

    def __call__(self, piece: Piece) -> None:
        assert not self.ended.is_set()  # nothing comes behind the last piece
        self.pieces.append(piece)
        if piece.finish is not None:
            self.ended.set()

    def wait(self) -> "Heard":
        assert self.ended.wait(60)
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[int]:
        """Where the request asked for `logprobs`."""
        return [chosen.token for piece in self.pieces for chosen in piece.chosen]

    @property
    def last(self) -> Piece:
        return self.pieces[-1]


@contextmanager
def engine(view: PeftModel, **options: Any) -> Iterator[Engine]:
    """A started engine, which is stopped at the end."""
    made = Engine(view, TOKENIZER, **options)
    made.start()
    try:
        yield made
    finally:
        made.stop(finish=False)


def asked(made: Engine, requests: Sequence[Request], pauses: Sequence[float] = (0.0,)) -> list[Heard]:
    """What each request hears, where they come with these pauses in turn."""
    answers: list[Heard] = []
    for i, request in enumerate(requests):
        answers.append(Heard())
        made.submit(request, answers[-1])
        time.sleep(pauses[i % len(pauses)])
    return [heard.wait() for heard in answers]


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Bytes, drawn."""
    drawn = torch.randint(FIRST, len(TOKENIZER), (length,), generator=torch.Generator().manual_seed(seed))
    return tuple(drawn.tolist())


def alone(view: PeftModel, request: Request) -> list[int]:
    """The tokens that `generate` gives for one request, greedily."""
    ids = torch.tensor([request.tokens])
    out: Any = view.generate(
        ids, attention_mask=torch.ones_like(ids), adapters=request.adapters or [], do_sample=False,
        max_new_tokens=request.max_tokens, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return out[0, len(request.tokens) :].tolist()
