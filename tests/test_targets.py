"""Words for parts of a model as targets: what each means in every family, and what no adapter can be put on."""

import io
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import models
from coadapt import BitFitConfig, BottleneckConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from coadapt.core import bypass, parts
from coadapt.core.layer import kind_of
from coadapt.training.inspect import targets_tables
from laws.setting import MAKE, close, logits, stir

MEANT: dict[str, dict[str, set[str]]] = {
    "llama": {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mlp": {"gate_proj", "up_proj", "down_proj"},
        "embeddings": {"embed_tokens"},
        "head": {"lm_head"},
    },
    "gpt2": {"attention": {"c_attn", "c_proj"}, "mlp": {"c_fc", "c_proj"}, "embeddings": {"wte"}, "head": {"lm_head"}},
    "t5": {"attention": {"q", "k", "v", "o"}, "mlp": {"wi", "wo"}, "embeddings": {"embed_tokens"}},
    "bert": {"attention": {"query", "key", "value", "dense"}, "mlp": {"dense"}, "embeddings": {"word_embeddings"}},
    "vit": {"head": {"classifier"}},
    "mixtral": {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "experts": {"gate_up_proj", "down_proj"},
        "router": {"weight"},
    },
}
"""Model -> word -> the last parts of the names that it means."""


def mamba() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 4}
    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=models.VOCABULARY, **sizes)).eval().requires_grad_(False)


def shared_experts() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    wide = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 40}
    own = {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 2}
    torch.manual_seed(0)
    config = Qwen2MoeConfig(vocab_size=models.VOCABULARY, **sizes, **wide, **own)
    return Qwen2MoeForCausalLM(config).eval().requires_grad_(False)


def meant(base: nn.Module, word: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the experts that "all-linear" leaves out
        return [
            part.place.path for part in PeftModel(base, LoraConfig(r=2, target_modules=word)).adapters.default.parts
        ]


@pytest.mark.parametrize("model", MEANT)
def test_words_mean_the_layers_of_that_part(model: str) -> None:
    for word, ends in MEANT[model].items():
        found = meant(MAKE[model](), word)
        assert {path.rpartition(".")[2] for path in found} == ends, word


@pytest.mark.parametrize("model", MAKE)
def test_the_words_are_apart_and_what_is_left_is_said(model: str) -> None:
    """Attention, feed-forward part, experts and routers share no layer, and with the head are all that is linear."""
    base = MAKE[model]()
    found: list[str] = []
    for word in ("attention", "mlp", "experts", "shared_experts", "router", "ssm", "head"):
        if any(role.startswith(parts.WORDS[word]) for role in parts.by_role(base)):
            layers, _ = parts.named(base, word)
            found += layers
    assert len(found) == len(set(found))
    linear = {p for p, m in base.named_modules() if (k := kind_of(m)) is not None and k.name == "linear"}
    others = {p for role, paths in parts.by_role(base).items() if role == "linear, other" for p in paths}
    assert set(found) | others == linear
    assert not others or model in ("bert", "plain", "conv"), "BERT's pooler; nothing tells the parts of plain modules"


def test_shared_experts_and_dense_layers_beside_a_mixture() -> None:
    base = shared_experts()  # every second layer is a mixture
    shared = {"gate_proj", "up_proj", "down_proj"}
    assert {p.split("shared_expert.")[-1] for p in meant(base, "shared_experts")} - shared == {
        "model.layers.1.mlp.shared_expert_gate"
    }
    assert sorted(meant(base, "mlp")) == sorted(f"model.layers.0.mlp.{name}" for name in shared)
    assert meant(base, ["experts"]) == [
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]


def test_words_names_and_layers_go_together() -> None:
    base = models.llama()
    assert meant(base, ["mlp", "q_proj"]) == meant(models.llama(), ["gate_proj", "up_proj", "down_proj", "q_proj"])
    view = PeftModel(base, LoraConfig(target_modules="attention", layers_to_transform=[1], exclude_modules=["k_proj"]))
    ends = [part.place.path for part in view.adapters.default.parts]
    assert ends == [f"model.layers.1.self_attn.{n}" for n in ("q_proj", "v_proj", "o_proj")]
    both = set(meant(models.mixtral(), ["all-linear", "experts"]))
    assert both == {*meant(models.mixtral(), "attention"), *meant(models.mixtral(), "experts")}
    other = PeftModel(models.llama(), IA3Config(target_modules="attention", feedforward_modules=[]))
    assert len(other.adapters.default.parts) == 8


def test_a_module_of_that_name_is_meant_before_the_word() -> None:
    """BERT's blocks have a module called `attention`: a bottleneck goes behind it, LoRA on its layers."""
    view = PeftModel(models.bert(), BottleneckConfig(target_modules=["attention"], bottleneck_size=4))
    assert [p.place.path for p in view.adapters.default.parts] == [f"bert.encoder.layer.{i}.attention" for i in (0, 1)]
    assert len(meant(models.bert(), ["attention"])) == 8


def test_experts_by_their_word_train_and_go_both_ways_to_the_field(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["attention", "experts", "router"], task_type="CAUSAL_LM")
    view = get_peft_model(models.mixtral(), config).eval()
    stir(view.adapters)
    logits(view).sum().backward()
    assert all(p.grad is not None for p in view.adapters.parameters())
    view.save_pretrained(tmp_path)
    expected = logits(view)
    again = PeftModel.from_pretrained(models.mixtral(), tmp_path)
    close(logits(again), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(models.mixtral(), tmp_path).eval()
    close(logits(theirs), expected, 1e-5)


# ---- what is read without being called -------------------------------------------------------------------------------


def test_layers_that_a_mixer_reads_are_no_targets() -> None:
    base = mamba()
    never = bypass.bypassed(base)
    assert {path.rpartition(".")[2] for path in never} == {"conv1d", "norm", "out_proj"}
    assert meant(base, "ssm") == meant(base, "all-linear") == [f"backbone.layers.{i}.mixer.in_proj" for i in (0, 1)]
    with pytest.raises(ValueError, match=r"out_proj' cannot be adapted: Mamba2Mixer\.forward reads its weight"):
        PeftModel(base, LoraConfig(target_modules=["out_proj"]))


def test_a_reading_behind_a_switch_that_is_off_does_not_count() -> None:
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": models.VOCABULARY}
    assert not bypass.bypassed(BloomForCausalLM(BloomConfig(**sizes)))
    exact = BloomForCausalLM(BloomConfig(**sizes, slow_but_exact=True, pretraining_tp=2))
    assert {p.rpartition(".")[2] for p in bypass.bypassed(exact)} == {"dense", "dense_4h_to_h"}


class Reader(nn.Module):
    """Uses one layer as it should, one by its weight, and looks at the dtype of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.looked_at = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.looked_at.weight.dtype)
        if isinstance(self.looked_at.weight, nn.Parameter) and self.looked_at.weight is not None:
            x = self.looked_at(x)
        return self.called(x) + nn.functional.linear(x, self.read.weight)


def test_reading_is_told_from_looking() -> None:
    assert bypass.bypassed(Reader()) == {"read": "Reader.forward reads its weight without calling it"}
    base = nn.Module()
    base.inner = Reader()
    assert set(bypass.bypassed(base)) == {"inner.read"}


@pytest.mark.parametrize(
    ("model", "word", "message"),
    [
        ("llama", "router", "this LlamaForCausalLM has no router to adapt. It has attention, mlp, embeddings, head"),
        ("vit", "embeddings", "this ViTForImageClassification has no embeddings to adapt"),
        ("conv", "attention", "has no attention to adapt. It has none"),
        ("llama", "attentoin", "the regular expression target_modules='attentoin' matches no module"),
    ],
)
def test_a_part_that_is_not_there(model: str, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PeftModel(MAKE[model](), LoraConfig(target_modules=word))


def test_a_method_without_experts_says_so() -> None:
    with pytest.raises(ValueError, match="names parameters that are no layers in this MixtralForCausalLM"):
        PeftModel(models.mixtral(), BitFitConfig(target_modules="experts"))
    with pytest.raises(ValueError, match="names parameters that are no layers"):
        PeftModel(models.mixtral(), BottleneckConfig(target_modules=["router"], bottleneck_size=4))


def test_ia3_scales_what_goes_into_the_end_of_each_expert() -> None:
    view = PeftModel(models.mixtral(), IA3Config(target_modules="experts"))
    parts = view.adapters.default.parts
    assert {(p.place.parameter, p.method.on_input, len(p.method.l)) for p in parts} == {
        ("down_proj", True, 48),
        ("gate_up_proj", False, 96),
    }


def test_the_table_says_what_each_word_means() -> None:
    for make, lines in (
        (models.mixtral, ["experts 4", "mlp none", "router 2", "model.layers.*.mlp.experts.down_proj"]),
        (shared_experts, ["experts 2", "shared_experts 4", "model.layers.*.mlp.shared_expert.gate_proj"]),
        (mamba, ["ssm 2", "attention none", "backbone.layers.*.mixer.out_proj Mamba2Mixer.forward reads its weight"]),
    ):
        text = io.StringIO()
        for table in targets_tables(make()):
            Console(file=text, width=140).print(table)
        told = " ".join(text.getvalue().split())
        assert all(line in told for line in lines), told
