from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.backbone import Backbone
from ..core.gates import tasks_told
from ..core.method import register
from .prompt import PromptTuning, PromptTuningConfig

SOURCES = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
"""Starts from what was trained on other tasks."""


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """A prompt for several tasks: what they share, times a matrix of low rank for each."""

    kind = "MULTITASK_PROMPT_TUNING"
    starts: ClassVar[tuple[str, ...]] = (*PromptTuningConfig.starts, *SOURCES)
    random_start: ClassVar[Mapping[str, Any]] = {
        **PromptTuningConfig.random_start,
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
    }

    num_tasks: int = 1
    """How many tasks there are; the call's `task_ids` say which one each row is of, counted from 0."""
    num_ranks: int = 1
    """R of each task's matrix."""
    prompt_tuning_init_state_dict_path: str | None = None
    """The adapter_model.safetensors of trained source tasks, for prompt_tuning_init "AVERAGE_SOURCE_TASKS" (one task,
    the mean of theirs), "EXACT_SOURCE_TASK" (one of them) or "ONLY_SOURCE_SHARED" (what they share, new matrices)."""
    prompt_tuning_init_task: int = 0
    """Which of the source tasks "EXACT_SOURCE_TASK" takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("num_tasks", "num_ranks")
        start, file = self.prompt_tuning_init, self.prompt_tuning_init_state_dict_path
        if (start in SOURCES) != (file is not None):
            raise ValueError(
                f"{type(self).__name__}: prompt_tuning_init={start!r} and prompt_tuning_init_state_dict_path={file!r} "
                f"do not go together: {', '.join(SOURCES)} read that file, and nothing else does."
            )
        self.no_effect("prompt_tuning_init_task", start != "EXACT_SOURCE_TASK", f"with {start!r}")
        if start in SOURCES[:2] and self.num_tasks != 1:
            raise ValueError(f"{type(self).__name__}: {start} starts one task, and num_tasks={self.num_tasks}.")


class Rows(nn.Module):
    """What a task's matrix has in common in front of all stacks of a model."""

    def __init__(self, tasks: int, ranks: int, width: int) -> None:
        super().__init__()
        self.V = nn.Parameter(0.02 * torch.randn(tasks, ranks, width))  # (tasks, R, D)


@register(MultitaskPromptTuningConfig)
class MultitaskPromptTuning(PromptTuning):
    """base([P * (U_t V_t); e]) for a row of task t, without the first N outputs

    Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, Wang et al. 2023, arXiv:2303.02861. The
    published R is 1. Different from the field: with one task, `task_ids` may be left out; the start that the paper's
    second step needs is read from safetensors only; an encoder-decoder has it where `prompt_sites` says, in generation
    as in training. Use it to train many tasks on one prompt, and then to start a new
    task from what they share. Parameters per site: N D + tasks R (N + D).
    """

    def __init__(
        self, config: MultitaskPromptTuningConfig, place: Backbone, base: Any, shared: Rows | None = None
    ) -> None:
        source = config.prompt_tuning_init in SOURCES
        super().__init__(config.with_random_start() if source else config, place, base, shared)
        self.tasks, n = config.num_tasks, config.num_virtual_tokens
        self.U = nn.Parameter(0.02 * torch.randn(config.num_tasks, n, config.num_ranks))  # (tasks, N, R)
        assert shared is not None
        self.shared_rows = (shared,)
        if source:
            self._start(config, place.role)

    @classmethod
    def shared(cls, config: MultitaskPromptTuningConfig, base: nn.Module, places: list[Any]) -> nn.Module:
        return Rows(config.num_tasks, config.num_ranks, places[0].width)

    @classmethod
    def facts(cls, config: Any, base: Any) -> dict[str, Any]:
        """Files of encoder-decoders mean both stacks where they do not say."""
        found, sites = super().facts(config, base), [place.role for place in cls.places(config, base)]
        part = found["num_transformer_submodules"] == 2 and len(sites) < 2
        return {**found, "prompt_sites": sites} if part else found

    @torch.no_grad()
    def _start(self, config: MultitaskPromptTuningConfig, role: str) -> None:
        """From a file, whose tokens are the encoder's first where it has those of two stacks."""
        path = Path(config.prompt_tuning_init_state_dict_path or "")
        if path.suffix != ".safetensors":
            raise ValueError(f"MultitaskPromptTuningConfig: {path} is no .safetensors file; others are not read.")
        stored = load_file(path)
        p, u, v = (stored[k] for k in ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows"))
        n = len(self.P)
        mine = slice(n, None) if role == "decoder" and len(p) == 2 * n else slice(0, n)
        p, u = p[mine], u[:, mine]
        if config.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            u, v = u.mean(0, keepdim=True), v.mean(0, keepdim=True)
        elif config.prompt_tuning_init == "EXACT_SOURCE_TASK":
            u, v = (t[config.prompt_tuning_init_task][None] for t in (u, v))
        pairs = [(self.P, p), (self.U, u), (self.shared_rows[0].V, v)]
        for own, found in pairs[: 1 if config.prompt_tuning_init == "ONLY_SOURCE_SHARED" else 3]:
            if own.shape != found.shape:
                raise ValueError(
                    f"MultitaskPromptTuningConfig: {path} was trained with other sizes: {tuple(found.shape)} where "
                    f"this has {tuple(own.shape)}."
                )
            own.copy_(found)

    def prompt(self) -> Tensor:
        tasks = tasks_told(self.tasks).to(self.U.device)
        made = self.P * (self.U[tasks] @ self.shared_rows[0].V[tasks])  # (B, N, D)
        return made[0] if self.tasks == 1 else made
