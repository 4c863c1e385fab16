"""What every row needs: how the run was asked for, the two libraries, a Llama, its tokens, and one training step."""

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

LIBRARIES: Mapping[str, Any] = {
    name: importlib.import_module(name) for name in ("peft", "coadapt") if importlib.util.find_spec(name) is not None
}
"""Both have the same names for the same things, so that each row is written once."""


@dataclass(frozen=True)
class Setting:
    """How a run was asked for."""

    device: str = "cpu"
    rounds: int = 20
    quick: bool = False
    """Tiny sizes, to see that everything runs. Such figures mean nothing."""

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def llama(setting: Setting, dtype: torch.dtype = torch.float32, **sizes: Any) -> LlamaForCausalLM:
    """A random Llama, the same each time: 4 layers of hidden size 512 unless said otherwise."""
    usual: dict[str, Any] = {
        "vocab_size": setting.size(1000, 50),
        "hidden_size": setting.size(512, 16),
        "intermediate_size": setting.size(1376, 24),
        "num_hidden_layers": setting.size(4, 1),
        "num_attention_heads": setting.size(8, 2),
    }
    config = LlamaConfig(**{**usual, **sizes}, use_cache=False)
    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(config)
    return base.to(setting.device, dtype)


def tokens(setting: Setting, rows: int, length: int) -> Tensor:
    """(rows, length), the same each time."""
    made = torch.randint(setting.size(1000, 50), (rows, length), generator=torch.Generator().manual_seed(1))
    return made.to(setting.device)


def batch(setting: Setting) -> Tensor:
    """4 x 128 tokens."""
    return tokens(setting, setting.size(4, 2), setting.size(128, 6))


LORA: Mapping[str, Any] = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
"""LoRA of rank 8 on all linear layers; its B is random, so that it changes something."""


def config(library: str, name: str, **options: Any) -> Any:
    """A configuration of this library, by the name that both have for it."""
    return getattr(LIBRARIES[library], name)(task_type="CAUSAL_LM", **options)


def adapted(library: str, base: nn.Module, name: str, **options: Any) -> Any:
    """`base` with one adapter of this library, in training mode."""
    return LIBRARIES[library].get_peft_model(base, config(library, name, **options), adapter_name="a0").train()


def add_loras(library: str, view: Any, names: Iterable[str]) -> None:
    for name in names:
        view.add_adapter(name, config(library, "LoraConfig", **LORA))


class Step:
    """Forward and backward of a language model's loss, and the gradients thrown away. The optimiser is left out."""

    def __init__(self, model: Any, **inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        leaves = [*model.parameters(), *(x for x in inputs.values() if isinstance(x, Tensor))]
        self.trained = [leaf for leaf in leaves if leaf.requires_grad]

    def forward(self) -> Tensor:
        return self.model(**self.inputs).loss

    def __call__(self) -> None:
        self.forward().backward()
        for leaf in self.trained:
            leaf.grad = None


def limit(base: LlamaForCausalLM, ids: Tensor) -> Step:
    """The limit of training: the frozen model's own forward, and its backward down to its inputs; no adapter."""
    base.requires_grad_(False)
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    return Step(base.train(), inputs_embeds=embedded, labels=ids)


def checkpointed(model: Any) -> Any:
    """`model`, that recomputes its layers in the backward from now on."""
    name = "activation_checkpointing_enable"  # its name since transformers 5.20
    enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model
