"""What several files here need: views with adapters that do something, and models that other programs' files make."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import SPECIAL, TEMPLATE
from coadapt import LoraConfig, PeftModel, get_peft_model
from coadapt.config import PeftConfig
from models import llama, stir

View = Callable[..., PeftModel]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def view(tmp_path: Path) -> View:
    """A view of a saved base with these adapters, moved away from their start; the last argument is what is active."""

    def make(*configs: PeftConfig, base: Any = None, active: Any = None, names: str = "abc") -> PeftModel:
        model = llama() if base is None else base
        model.save_pretrained(tmp_path / "base")
        model.name_or_path = model.config.name_or_path = str(tmp_path / "base")
        made = get_peft_model(model, configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=False):
            made.add_adapter(name, config)
        stir(made.adapters)
        if active is not None:
            made.set_adapter(active)
        return made.eval()

    return make


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few words that are joined of them, as GPT-2's tokenizer does it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "c"), ("Ġc", "at"), ("a", "t")]
    words = ["th", "the", "Ġthe", "in", "at", "Ġc", "Ġcat"]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate([*SPECIAL, *letters, *words])}, merges=merges))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def patterned(**options: Any) -> LoraConfig:
    """A LoRA whose scales and ranks differ from layer to layer, which simple readers do not know of."""
    return LoraConfig(
        r=4,
        use_rslora=True,
        rank_pattern={"v_proj": 3, "layers.0.self_attn.q_proj": 2},
        alpha_pattern={"q_proj": 5},
        target_modules=["q_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        **options,
    )
