"""A resized vocabulary: its new rows are saved or trained, tied or not, and the base is never resized in silence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from byte_tokenizer import save_base
from coadapt import LoraConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from coadapt.formats.vocabulary import rows_needed
from coadapt.training.load import load
from models import MODELS, VOCABULARY, ids, logits, stir
from steps import traces

from .field import far, field_loaded, field_logits

NEW = [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]


@pytest.fixture(params=["llama", "gpt2", "t5"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base in a folder: with a head of its own (llama), a tied one (gpt2), one that two stacks share (t5)."""
    MODELS[request.param]().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def base(where: Path, seed: int = 0, more: int = 3) -> Any:
    """The base with new rows, which are other ones for each seed."""
    auto = AutoModelForSeq2SeqLM if where.name == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(where).eval().requires_grad_(False)
    torch.manual_seed(seed)
    if more:
        model.resize_token_embeddings(VOCABULARY + more, mean_resizing=False)
    return model


def new_tokens() -> Tensor:
    tokens = ids()
    tokens[:, 2], tokens[:, 4] = NEW[0], NEW[2]
    return tokens


def test_new_rows_are_saved_with_the_adapter(where: Path, tmp_path: Path) -> None:
    view = get_peft_model(base(where), LoraConfig(r=2, target_modules="all-linear")).eval()
    stir(view.adapters)
    expected = logits(view, new_tokens())
    view.save_pretrained(tmp_path / "out")
    other = base(where, seed=1)
    before = traces(other)
    assert far(logits(other, new_tokens()), logits(base(where), new_tokens())) > 1e-3, "the new rows differ"
    again = PeftModel.from_pretrained(other, tmp_path / "out")
    assert far(logits(again, new_tokens()), expected) < 1e-6
    again.save_pretrained(tmp_path / "again")
    assert far(logits(PeftModel.from_pretrained(base(where, 2), tmp_path / "again"), new_tokens()), expected) < 1e-6
    again.unload()
    assert traces(other) == before, "the rows were the adapter's, not put into the base"
    assert far(field_logits(field_loaded(base(where, 3), tmp_path / "again"), new_tokens()), expected) < 1e-5


def test_merged_with_its_rows(where: Path, tmp_path: Path) -> None:
    view = get_peft_model(base(where), LoraConfig(r=2, target_modules="all-linear")).eval()
    stir(view.adapters)
    expected = logits(view, new_tokens())
    view.save_pretrained(tmp_path / "out")
    merged: Any = PeftModel.from_pretrained(base(where, 1), tmp_path / "out").merge_and_unload()
    assert far(logits(merged, new_tokens()), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    plain = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert plain.config.get_text_config().vocab_size == VOCABULARY + 3
    assert plain.config.tie_word_embeddings == base(where).config.tie_word_embeddings, "ties stay ties"
    assert far(logits(plain, new_tokens()), expected) < 1e-5


@pytest.mark.parametrize("alone", [True, False])
def test_new_rows_that_are_trained(where: Path, tmp_path: Path, alone: bool) -> None:
    both = ["embed_tokens", "lm_head"] if where.name == "llama" else None
    tokens = TrainableTokensConfig(token_indices=NEW, target_modules=both)
    beside = dict.fromkeys(both, NEW) if both else NEW
    config = tokens if alone else LoraConfig(r=2, trainable_token_indices=beside)
    view = get_peft_model(base(where), config).train()
    before = logits(view, new_tokens()).detach()
    logits(view, new_tokens()).square().mean().backward()
    rows = {n: p for n, p in view.named_parameters() if n.endswith("rows") and p.requires_grad}
    assert len(rows) == (2 if where.name == "llama" else 1), "tied rows are one parameter"
    with torch.no_grad():
        for parameter in rows.values():
            assert parameter.grad is not None
            assert bool((parameter.grad != 0).any())
            parameter -= parameter.grad
    expected = logits(view.eval(), new_tokens())
    assert far(expected, before) > 1e-4
    view.save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    whole = [k for k, t in written.items() if "lora" not in k and len(t) > len(NEW)]
    assert not whole, "the rest of the vocabulary is not written"
    again = PeftModel.from_pretrained(base(where, 1), tmp_path / "out")
    # Rows that are the adapter's own are exact; a head that is not adapted has rows of its own in each base.
    assert far(logits(again, new_tokens()), expected) < 1e-5


def test_a_base_that_was_not_resized_is_refused(where: Path, tmp_path: Path) -> None:
    get_peft_model(base(where), PromptTuningConfig(num_virtual_tokens=2)).save_pretrained(tmp_path / "out")
    for more in (0, 1):
        other = base(where, 1, more)
        before = traces(other)
        with pytest.raises(ValueError, match=rf"vocabulary of {VOCABULARY + 3} tokens.*resize_token_embeddings"):
            PeftModel.from_pretrained(other, tmp_path / "out")
        assert traces(other) == before
    bigger = PeftModel.from_pretrained(base(where, 1, more=8), tmp_path / "out")
    assert bigger.get_input_embeddings().weight.shape[0] == VOCABULARY + 8, "and never shrunk"


def test_nothing_is_written_where_nothing_was_resized(where: Path, tmp_path: Path) -> None:
    view = get_peft_model(base(where, more=0), LoraConfig(r=2))
    view.save_pretrained(tmp_path / "out")
    assert not [k for k in load_file(tmp_path / "out" / "adapter_model.safetensors") if "lora" not in k]
    view.save_pretrained(tmp_path / "all", save_embedding_layers=True)
    assert [k for k in load_file(tmp_path / "all" / "adapter_model.safetensors") if "lora" not in k]
    resized = get_peft_model(base(where), LoraConfig(r=2))
    resized.save_pretrained(tmp_path / "none", save_embedding_layers=False)
    assert not [k for k in load_file(tmp_path / "none" / "adapter_model.safetensors") if "lora" not in k]
    with pytest.raises(ValueError, match="save_embedding_layers='yes' is not one of"):
        view.save_pretrained(tmp_path / "x", save_embedding_layers="yes")


def test_the_command_line_makes_room_and_says_so(tmp_path: Path) -> None:
    """Its base is nobody else's. Other tables than the vocabulary's (positions) do not count."""
    where = save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(where)
    size = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="brings 2 tokens more"):
        ready: Any = load(str(where), tmp_path / "out").model
    assert ready.get_input_embeddings().weight.shape[0] == size + 2
    positions = get_peft_model(MODELS["gpt2"](), LoraConfig(r=2, modules_to_save=["wpe"]))
    positions.save_pretrained(tmp_path / "positions")
    assert rows_needed(tmp_path / "positions", MODELS["gpt2"]()) == 0
