"""llama.cpp in a few lines of numpy: what it computes from a GGUF file, with an adapter, and how it cuts texts."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import regex

Arrays = dict[str, np.ndarray]


def read(file: Path) -> tuple[Arrays, dict[str, Any]]:
    """Tensors and fields."""
    reader = gguf.GGUFReader(file)
    tensors = {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]).astype(np.float64) for t in reader.tensors
    }
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def with_adapter(tensors: Arrays, file: Path) -> Arrays:
    """W + alpha / R B A, where R is that of the tensor: the configuration's is not looked at."""
    own, facts = read(file)
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    out = dict(tensors)
    while own:
        name = next(iter(own)).rpartition(".lora_")[0]
        a, b = own.pop(f"{name}.lora_a"), own.pop(f"{name}.lora_b")
        rank = b.shape[-1]
        product = a @ b.T if name == "token_embd.weight" else b @ a
        assert product.shape == out[name].shape
        out[name] = out[name] + facts["adapter.lora.alpha"] / rank * product
    return out


def _softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(T, H, D) each; keys and values may have fewer heads."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    return np.einsum("hts,shd->thd", _softmax(scores), v).reshape(len(q), -1)


def _turned(x: np.ndarray, base: float, pairs: bool, factors: np.ndarray | float) -> np.ndarray:
    """Rotary embedding: of neighbours (2i, 2i + 1) in Llama's files, of (i, i + D/2) in others."""
    t, _, d = x.shape
    angle = np.arange(t)[:, None] * base ** (-np.arange(0, d, 2) / d)[None] / factors
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    one, other = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., : d // 2], x[..., d // 2 :])
    new = one * cos - other * sin, one * sin + other * cos
    return np.stack(new, -1).reshape(x.shape) if pairs else np.concatenate(new, -1)


def llama(t: Arrays, facts: dict[str, Any], ids: list[int]) -> np.ndarray:
    """Logits (T, V) of Llama, and of Qwen 2 and 3."""
    arch = facts["general.architecture"]
    eps, theta = facts[f"{arch}.attention.layer_norm_rms_epsilon"], facts[f"{arch}.rope.freq_base"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * t[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)

    h = t["token_embd.weight"][ids]
    for i in range(facts[f"{arch}.block_count"]):
        at = f"blk.{i}"
        x = norm(h, f"{at}.attn_norm")
        q, k, v = (linear(x, f"{at}.attn_{n}") for n in "qkv")
        q = q.reshape(len(ids), facts[f"{arch}.attention.head_count"], -1)
        k, v = (y.reshape(len(ids), facts[f"{arch}.attention.head_count_kv"], -1) for y in (k, v))
        if f"{at}.attn_q_norm.weight" in t:
            q, k = norm(q, f"{at}.attn_q_norm"), norm(k, f"{at}.attn_k_norm")
        q, k = (_turned(y, theta, arch == "llama", t.get("rope_freqs.weight", 1.0)) for y in (q, k))
        h = h + linear(_attend(q, k, v), f"{at}.attn_output")
        x = norm(h, f"{at}.ffn_norm")
        gate = linear(x, f"{at}.ffn_gate")
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, f"{at}.ffn_up"), f"{at}.ffn_down")
    return norm(h, "output_norm") @ t.get("output.weight", t["token_embd.weight"]).T


def gpt2(t: Arrays, facts: dict[str, Any], ids: list[int]) -> np.ndarray:
    """Logits (T, V)."""
    eps, heads = facts["gpt2.attention.layer_norm_epsilon"], facts["gpt2.attention.head_count"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    h = t["token_embd.weight"][ids] + t["position_embd.weight"][: len(ids)]
    for i in range(facts["gpt2.block_count"]):
        q, k, v = np.split(linear(norm(h, f"blk.{i}.attn_norm"), f"blk.{i}.attn_qkv"), 3, -1)
        q, k, v = (x.reshape(len(ids), heads, -1) for x in (q, k, v))
        h = h + linear(_attend(q, k, v), f"blk.{i}.attn_output")
        x = linear(norm(h, f"blk.{i}.ffn_norm"), f"blk.{i}.ffn_up")
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        h = h + linear(x, f"blk.{i}.ffn_down")
    return norm(h, "output_norm") @ t.get("output.weight", t["token_embd.weight"]).T


def tokens(facts: dict[str, Any], text: str) -> list[int]:
    """A text without special tokens in it, cut as the file says."""
    known = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    found = (
        _by_scores(facts, known, text) if facts["tokenizer.ggml.model"] == "llama" else _by_merges(facts, known, text)
    )
    begin = [facts["tokenizer.ggml.bos_token_id"]] if facts["tokenizer.ggml.add_bos_token"] else []
    return begin + found + ([facts["tokenizer.ggml.eos_token_id"]] if facts["tokenizer.ggml.add_eos_token"] else [])


def _by_scores(facts: dict[str, Any], known: dict[str, int], text: str) -> list[int]:
    scores = facts["tokenizer.ggml.scores"]
    parts = list(("▁" if facts["tokenizer.ggml.add_space_prefix"] else "") + text.replace(" ", "▁"))
    while True:
        joined = [(scores[known[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in known]
        if not joined:
            break
        i = -max(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        i
        for part in parts
        for i in ([known[part]] if part in known else [known[f"<0x{b:02X}>"] for b in part.encode()])
    ]


SPLIT = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
}


def _by_merges(facts: dict[str, Any], known: dict[str, int], text: str) -> list[int]:
    from gguf.vocab import bytes_to_unicode

    letters = bytes_to_unicode()
    order = {pair: i for i, pair in enumerate(facts["tokenizer.ggml.merges"])}
    out: list[int] = []
    for word in regex.findall(SPLIT[facts["tokenizer.ggml.pre"]] + r"|\s+", text):
        parts = [letters[b] for b in word.encode()]
        while pairs := [(order[f"{a} {b}"], i) for i, (a, b) in enumerate(pairwise(parts)) if f"{a} {b}" in order]:
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        out += [known[part] for part in parts]
    return out
