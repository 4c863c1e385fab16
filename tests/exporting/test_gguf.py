"""GGUF: what llama.cpp computes from the files (tests/exporting/llama_cpp.py) is what coadapt computes.

Once, by hand, the same was compared with llama.cpp itself and was equal: docs/export.md has the figures.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer
from coadapt import IA3Config, LNTuningConfig, LoraConfig, export, get_peft_model
from coadapt.demo import BASE
from coadapt.formats.gguf import model as whole
from coadapt.formats.gguf import tokenizer as tokenizers
from coadapt.formats.gguf.names import in_pairs
from models import gemma2, gpt2, llama, logits, mixtral, qwen2, qwen3, stir
from tests.exporting import llama_cpp
from tests.exporting.conftest import View, patterned, words_tokenizer

IDS = [5, 9, 3, 33, 60, 7, 8]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SHAPES: dict[str, Any] = {
    "llama": llama,
    "llama-tied": lambda **o: llama(tie_word_embeddings=True, **o),
    "llama-biases": lambda **o: llama(attention_bias=True, mlp_bias=True, head_dim=10, **o),
    "llama3": lambda **o: llama(rope_parameters=LLAMA3, **o),
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gpt2": gpt2,
}
RUN = {"gpt2": llama_cpp.gpt2}
STORIES = Path(__file__).resolve().parents[3] / "shared" / "assets" / "weights" / "stories260K-hf"


def made(name: str, **options: Any) -> Any:
    """With biases that are not zero."""
    model = SHAPES[name](**options)
    stir(model, seed=3, by=0.2)
    return model


def run(name: str, tensors: Any, facts: Any, ids: list[int] = IDS) -> torch.Tensor:
    return torch.from_numpy(RUN.get(name, llama_cpp.llama)(tensors, facts, ids))


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other.double()).detach().abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_merged_model_and_the_adapter(view: View, tmp_path: Path, name: str) -> None:
    tokenizer = words_tokenizer()
    base = made(name, vocab_size=len(tokenizer) + 3)  # more rows than tokens
    plain = tmp_path / "base.gguf"
    whole.write(base, tokenizer, plain, "base")
    tensors, facts = llama_cpp.read(plain)
    at = torch.tensor([IDS])
    assert off(run(name, tensors, facts), logits(base, at)[0]) < 1e-5
    adapter = view(LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear", init_lora_weights=False),
                   base=base)  # fmt: skip
    meant = logits(adapter, at)[0]
    assert off(meant, logits(base, at)[0]) > 0.01
    export(adapter, "llamacpp", tmp_path / "adapter")
    both = llama_cpp.with_adapter(tensors, tmp_path / "adapter" / "adapter.gguf")
    assert off(run(name, both, facts), meant) < 1e-5
    done = export(adapter, "llamacpp", tmp_path / "merged", merged=True, tokenizer=tokenizer)
    assert off(run(name, *llama_cpp.read(tmp_path / "merged" / "model.gguf")), meant) < 1e-5
    assert done.drift is not None and done.drift.share < 1e-4


def test_queries_and_keys_are_turned_by_neighbours() -> None:
    rows = np.arange(12).reshape(12, 1)  # two heads of six
    assert in_pairs(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_the_embedding_and_the_head_have_their_own_layout(view: View, tmp_path: Path) -> None:
    base = llama(vocab_size=300)
    whole.write(base, words_tokenizer(), tmp_path / "base.gguf", "base")
    tensors, facts = llama_cpp.read(tmp_path / "base.gguf")
    adapter = view(LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False), base=base)
    export(adapter, "llamacpp", tmp_path / "out")
    own, _ = llama_cpp.read(tmp_path / "out" / "adapter.gguf")
    assert own["token_embd.weight.lora_a"].shape == (300, 2)  # as llama.cpp's loader checks it
    both = llama_cpp.with_adapter(tensors, tmp_path / "out" / "adapter.gguf")
    assert off(run("llama", both, facts), logits(adapter, torch.tensor([IDS]))[0]) < 1e-5


def test_only_layers_that_change_are_in_the_file(view: View, tmp_path: Path) -> None:
    adapter = view(patterned(layers_to_transform=[0, 1]), IA3Config(layers_to_transform=[1]), active="b")
    export(adapter, "llamacpp", tmp_path / "out", r="full")
    own, facts = llama_cpp.read(tmp_path / "out" / "adapter.gguf")
    assert {name.split(".")[1] for name in own} == {"1"}
    assert facts["adapter.lora.alpha"] == own["blk.1.attn_v.weight.lora_a"].shape[0]


def test_8_bit_blocks_and_half_precision(view: View, tmp_path: Path) -> None:
    tokenizer = words_tokenizer()
    adapter = view(LoraConfig(r=2, init_lora_weights=False), base=made("llama", vocab_size=len(tokenizer)))
    at = torch.tensor([IDS])
    meant = logits(adapter, at)[0]
    done = export(adapter, "llamacpp", tmp_path / "q", merged=True, tokenizer=tokenizer, quantise="q8_0")
    file = tmp_path / "q" / "model.q8_0.gguf"
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")
    assert kinds["blk.0.ffn_down.weight"] == "F32"  # rows of 48 numbers are no whole blocks
    found = run("llama", *llama_cpp.read(file))
    adapter.merge_adapter()
    rounded = logits(whole.rounded(adapter.get_base_model()), at)[0]
    adapter.unmerge_adapter()
    assert off(found, rounded) < 1e-5
    assert 1e-4 < off(found, meant)
    assert 0 < done.facts["q8_0_drift"].share < 0.5
    half = view(LoraConfig(r=2, init_lora_weights=False), base=made("gpt2", vocab_size=len(tokenizer)).bfloat16())
    export(half, "llamacpp", tmp_path / "half", merged=True, tokenizer=tokenizer)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "half" / "model.gguf").tensors}
    assert (kinds["blk.0.attn_qkv.weight"], kinds["blk.0.attn_qkv.bias"]) == ("BF16", "F32")
    assert whole.rounded(made("gpt2")).transformer.h[0].attn.c_proj.weight.shape == (32, 32)


def test_rounding_keeps_the_layout_of_square_layers() -> None:
    base = made("gpt2")
    before = base.transformer.h[0].attn.c_proj.weight
    after = whole.rounded(base).transformer.h[0].attn.c_proj.weight
    assert 0 < float((after - before).norm() / before.norm()) < 0.01


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = [
    "Once upon a time, there was a cat.",
    "  Two  spaces, a tab\tand ümläuts 🙂!\nA line's end. ",
    "",
    "x",
    "12345 6",
]


def pieces(options: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of SentencePiece's kind: pieces, the best first, joined by any two of their parts that are pieces."""
    words = [
        "he",
        "▁t",
        "in",
        "▁a",
        "▁th",
        "ll",
        "▁the",
        "hell",
        "▁he",
        "ello",
        "hello",
        "▁hello",
        "▁time",
        "me",
        "ime",
    ]
    letters = sorted({c for word in words for c in word} | set(" cxsupon,.".replace(" ", "▁")))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [(w[:i], w[i:]) for w in words for i in range(1, len(w)) if w[:i] in vocab and w[i:] in vocab]
    if options == "apart":
        merges = merges[::2] + merges[1::2]
    if options == "lost":
        merges = [m for m in merges if m != ("h", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def written(tokenizer: Any, file: Path, rows: int | None = None) -> dict[str, Any]:
    writer = gguf.GGUFWriter(file, "llama")
    tokenizers.add(writer, tokenizer, rows or len(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", ["pieces", "demo", "words", "stories"])
def test_texts_are_cut_as_by_transformers(tmp_path: Path, name: str) -> None:
    if name == "stories" and not STORIES.is_dir():
        pytest.skip("the pretrained stories260K is not here")
    made: dict[str, Any] = {
        "pieces": pieces,
        "demo": lambda: AutoTokenizer.from_pretrained(BASE),
        "words": words_tokenizer,
        "stories": lambda: AutoTokenizer.from_pretrained(STORIES),
    }
    tokenizer = made[name]()
    facts = written(tokenizer, tmp_path / "file.gguf")
    for text in (*TEXTS, "hello the hell time in a the"):
        if text or name == "demo":  # llama.cpp puts no space before nothing
            assert llama_cpp.tokens(facts, text) == tokenizer(text)["input_ids"], text
    if tokenizer.chat_template:
        assert facts["tokenizer.chat_template"] == tokenizer.chat_template


def test_rows_without_a_token_are_unused(tmp_path: Path) -> None:
    tokenizer = words_tokenizer()
    facts = written(tokenizer, tmp_path / "file.gguf", len(tokenizer) + 2)
    assert len(facts["tokenizer.ggml.tokens"]) == len(tokenizer) + 2
    assert facts["tokenizer.ggml.token_type"][-2:] == [5, 5]
    assert facts["tokenizer.ggml.token_type"][:2] == [3, 3]


def odd(**parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
ODD: dict[str, tuple[Any, str]] = {
    "none": (lambda: None, "this is NoneType"),
    "words": (lambda: odd(pre_tokenizer=pre_tokenizers.Whitespace()), "it is BPE with Whitespace before it"),
    "space": (lambda: odd(pre_tokenizer=pre_tokenizers.ByteLevel()), "a space before each text"),
    "uncut": (lambda: odd(pre_tokenizer=pre_tokenizers.ByteLevel(False, use_regex=False)), "does not cut texts"),
    "lower": (lambda: odd(pre_tokenizer=BYTES, normalizer=normalizers.Lowercase()), "normalises texts by Lowercase"),
    "digits": (
        lambda: odd(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), BYTES])),
        "cuts texts by Digits, ByteLevel",
    ),
    "single": (byte_tokenizer, "it joins no bytes"),
    "lost": (lambda: pieces("lost"), "does not join 'h' and 'e'"),
    "apart": (lambda: pieces("apart"), "stand apart in its list"),
}


@pytest.mark.parametrize("name", ODD)
def test_other_tokenizers_are_refused_by_name(name: str) -> None:
    make, message = ODD[name]
    with pytest.raises(ValueError, match=message):
        tokenizers.check(make(), 1000)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="knows 268 tokens, the model 260"):
        tokenizers.check(words_tokenizer(), 260)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (gemma2, {}, "this is a gemma2 model"),
        (mixtral, {}, "this is a mixtral model"),
        (llama, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (llama, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'yarn'"),
        (gpt2, {"activation_function": "relu"}, "activation_function is 'relu'"),
        (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scaled in another way"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(
    tmp_path: Path, make: Any, options: dict[str, Any], message: str
) -> None:
    base = make(vocab_size=300, **options)
    made = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"] if make is not gpt2 else ["c_attn"]))
    with pytest.raises(ValueError, match=message):
        export(made, "llamacpp", tmp_path / "out", merged=True, tokenizer=words_tokenizer())
    assert not (tmp_path / "out").exists()


def test_norms_are_merged(view: View, tmp_path: Path) -> None:
    tokenizer = words_tokenizer()
    adapter = view(LNTuningConfig(), base=llama(vocab_size=len(tokenizer)))
    export(adapter, "ollama", tmp_path / "out", merged=True, tokenizer=tokenizer)
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    found = run("llama", *llama_cpp.read(tmp_path / "out" / "model.gguf"))
    assert off(found, logits(adapter, torch.tensor([IDS]))[0]) < 1e-5


@pytest.mark.skipif(not STORIES.is_dir(), reason="the pretrained stories260K is not here")
def test_a_real_llama(view: View, tmp_path: Path) -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)
    adapter = view(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), base=base)
    export(adapter, "llamacpp", tmp_path / "out", merged=True, tokenizer=tokenizer)
    tensors, facts = llama_cpp.read(tmp_path / "out" / "model.gguf")
    ids = llama_cpp.tokens(facts, "Once upon a time, there was a little girl")
    assert ids == tokenizer("Once upon a time, there was a little girl")["input_ids"]
    meant = logits(adapter, torch.tensor([ids]))[0].detach()
    assert off(run("llama", tensors, facts, ids), meant) < 1e-4 * float(meant.abs().max())
