"""sentence-transformers: an adapter in its encoder is trained, saved and loaded by its own methods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel

st = pytest.importorskip("sentence_transformers")


@pytest.fixture
def encoder(tmp_path: Path, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=48, max_position_embeddings=64, pad_token_id=0, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    tokenizer.save_pretrained(tmp_path / "bert")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    words = Transformer(str(tmp_path / "bert"))
    return st.SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())], device="cpu")


def test_an_adapter_is_trained_and_loaded_again(encoder: Any, arguments: Callable[..., Any], tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer import losses

    texts = ["aa", "bcd", "z1"]
    before = encoder.encode(texts)
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    encoder.add_adapter(config)
    assert encoder.active_adapters() == ["default"]
    data = Dataset.from_list([{"anchor": f"{a}{a}", "positive": f"{a}b"} for a in range(8)])
    trainer = st.SentenceTransformerTrainer(
        model=encoder,
        args=arguments(st.SentenceTransformerTrainingArguments, max_steps=8),
        train_dataset=data,
        loss=losses.MultipleNegativesRankingLoss(encoder),
    )
    weights = {n: p.clone() for n, p in encoder.named_parameters()}
    trainer.train()
    course = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(course[4:]) < sum(course[:4])
    changed = {n for n, p in encoder.named_parameters() if not torch.equal(p, weights[n])}
    assert changed and all("peft_adapters" in n for n in changed)
    after = encoder.encode(texts)
    assert abs(after - before).max() > 1e-3
    encoder.disable_adapters()
    assert abs(encoder.encode(texts) - before).max() < 1e-6
    encoder.enable_adapters()
    encoder.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_config.json").is_file()
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(again.encode(texts) - after).max() < 1e-6
