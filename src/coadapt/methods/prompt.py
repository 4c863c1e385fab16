from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..config import InputConfig
from ..core.backbone import Backbone
from ..core.method import InputMethod, register


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(InputConfig):
    """Trained virtual tokens in front of the embedded input."""

    kind = "PROMPT_TUNING"
    starts: ClassVar[tuple[str, ...]] = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
    """The values of `prompt_tuning_init`."""
    random_start: ClassVar[Mapping[str, Any]] = {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_kwargs": None,
    }
    """What makes it start without reading anything."""

    prompt_tuning_init: str = "RANDOM"
    """"RANDOM" (normal, with the spread of the model's own embeddings), "SAMPLE_VOCAB" (embeddings of tokens drawn from
    the vocabulary) or "TEXT" (embeddings of `prompt_tuning_init_text`, repeated or cut to N)."""
    prompt_tuning_init_text: str | None = None
    """The text to start from."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer for that text; left out, the one at the base's `name_or_path`."""
    tokenizer_kwargs: Mapping[str, Any] | None = None
    """Passed on to the tokenizer's `from_pretrained`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "prompt_tuning_init", str(self.prompt_tuning_init).rpartition(".")[2])
        self.choice("prompt_tuning_init", self.starts)
        by_text = self.prompt_tuning_init == "TEXT"
        if by_text and not self.prompt_tuning_init_text:
            raise ValueError(f"{type(self).__name__}: prompt_tuning_init='TEXT' needs prompt_tuning_init_text.")
        for name in ("prompt_tuning_init_text", "tokenizer_kwargs"):
            if getattr(self, name) and not by_text:
                raise ValueError(
                    f"{type(self).__name__}: {name} has no effect with prompt_tuning_init={self.prompt_tuning_init!r}."
                )

    def with_random_start(self) -> Self:
        """The same adapter, whose start reads nothing."""
        return replace(self, **self.random_start)


@register(PromptTuningConfig)
class PromptTuning(InputMethod):
    """base([P; e]), without the first N outputs

    The Power of Scale for Parameter-Efficient Prompt Tuning, Lester et al. 2021, arXiv:2104.08691. Use it on large
    models, where one short vector per task is all that is kept. Parameters per site: N D.
    """

    def __init__(self, config: PromptTuningConfig, place: Backbone, base: Any, shared: nn.Module | None = None) -> None:
        super().__init__(config, place, base, shared)
        self.P = nn.Parameter(_start(config, place.embedding, base))  # (N, D)

    def prompt(self) -> Tensor:
        return self.P


def _start(config: PromptTuningConfig, embedding: nn.Embedding, base: Any) -> Tensor:
    """(N, D), as the embedding gives tokens: scaled, where it scales what it looks up."""
    n, vocabulary = config.num_virtual_tokens, embedding.weight  # (V, D)
    if vocabulary.is_meta and config.prompt_tuning_init == "RANDOM":
        return 0.02 * torch.randn(n, vocabulary.shape[1])
    if vocabulary.is_meta:
        raise ValueError(
            f"PromptTuningConfig: prompt_tuning_init={config.prompt_tuning_init!r} reads the model's embeddings, whose "
            "values are not here (meta device, or offloaded). Use 'RANDOM'."
        )
    vocabulary = vocabulary.detach().float() * getattr(embedding, "embed_scale", 1.0)
    match config.prompt_tuning_init:
        case "SAMPLE_VOCAB":
            return vocabulary[torch.randint(len(vocabulary), (n,))].clone()
        case "TEXT":
            ids = _text_ids(config, base)
            return vocabulary[(ids * (n // len(ids) + 1))[:n]].clone()
        case _:
            return torch.randn(n, vocabulary.shape[1]) * vocabulary.std().cpu()


def _text_ids(config: PromptTuningConfig, base: Any) -> list[int]:
    from transformers import AutoTokenizer

    where = config.tokenizer_name_or_path or getattr(base, "name_or_path", "")
    if not where:
        raise ValueError(
            "PromptTuningConfig: a start from a text needs tokenizer_name_or_path; this model does not say "
            "where its own is."
        )
    tokenizer = AutoTokenizer.from_pretrained(where, **(config.tokenizer_kwargs or {}))
    ids = tokenizer(config.prompt_tuning_init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"PromptTuningConfig: prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no tokens."
        )
    return list(ids)
