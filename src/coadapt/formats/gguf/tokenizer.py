"""A tokenizer of transformers as the tables of a GGUF file."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .names import package

GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_SPLIT = rf"{_WORDS}|\p{{N}}|{_REST}"
SPLITS = {GPT2_SPLIT: "gpt-2", LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}
"""How a text is cut before merging -> what llama.cpp calls that."""
MARK = "▁"
"""What stands for a space in SentencePiece's tokens."""


@dataclass(frozen=True)
class Tables:
    """What a GGUF file says of a tokenizer."""

    model: str
    """Either "llama" (SentencePiece, by scores) or "gpt2" (bytes, by merges)."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None


def check(tokenizer: Any, rows: int) -> None:
    """Raises ValueError where llama.cpp has no tokenizer like this one."""
    tables(tokenizer, rows)


def add(writer: Any, tokenizer: Any, rows: int) -> None:
    """Writes the tables, the special tokens, and the chat template."""
    found = tables(tokenizer, rows)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.space_prefix is not None:
        writer.add_add_space_prefix(found.space_prefix)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def tables(tokenizer: Any, rows: int) -> Tables:
    """The tables of a tokenizer for a model with `rows` embeddings.

    Raises:
        ValueError: it is of a kind that llama.cpp does not have, or not one that is read here.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"A GGUF file of a model holds its tokenizer, and only fast ones can be written: this is "
            f"{type(tokenizer).__name__}."
        )
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer knows {len(tokenizer)} tokens, the model {rows}: llama.cpp needs as many rows."
        )
    kind = said["model"]["type"]
    steps = _steps(said["pre_tokenizer"])
    if kind == "BPE" and steps and steps[-1]["type"] == "ByteLevel":
        return _by_bytes(tokenizer, said, steps, rows)
    if kind == "BPE" and said["model"].get("byte_fallback"):
        return _by_scores(tokenizer, said, steps, rows)
    raise _strange(f"it is {kind} with {', '.join(s['type'] for s in steps) or 'nothing'} before it")


def _strange(why: str) -> ValueError:
    return ValueError(
        f"This tokenizer cannot be written as GGUF: {why}. Those of GPT-2's, Llama's, Llama 3's and Qwen's kind can. "
        "Write the merged model for transformers (--for transformers --merged) and convert it with llama.cpp's "
        "convert_hf_to_gguf.py."
    )


def _steps(part: Any) -> list[dict[str, Any]]:
    """A part of a tokenizer as the list of its steps."""
    if part is None:
        return []
    inner = part.get("pretokenizers", part.get("normalizers"))
    return [part] if inner is None else [step for one in inner for step in _steps(one)]


def _filled(tokenizer: Any, said: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """A token and its type for each row of the embedding; rows without one are unused."""
    types = package().TokenType
    tokens = [f"[unused{i}]" for i in range(rows)]
    kinds = [int(types.UNUSED)] * rows
    for token, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = token, int(types.NORMAL)
    for added in said["added_tokens"]:
        kinds[added["id"]] = int(types.CONTROL if added["special"] else types.USER_DEFINED)
    return tokens, kinds


# ---- bytes and merges: GPT-2, Llama 3, Qwen --------------------------------------------------------------------------


def _by_bytes(tokenizer: Any, said: Mapping[str, Any], steps: list[dict[str, Any]], rows: int) -> Tables:
    model, last = said["model"], steps[-1]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if last.get("add_prefix_space"):
        raise _strange("it puts a space before each text")
    if others := [s["type"] for s in _steps(said["normalizer"]) if s["type"] != "NFC"]:
        raise _strange(f"it normalises texts by {', '.join(others)}")
    split = GPT2_SPLIT if last.get("use_regex", True) else None
    if len(steps) == 2 and steps[0]["type"] == "Split":
        split = steps[0]["pattern"].get("Regex")
    elif len(steps) > 1:
        raise _strange(f"it cuts texts by {', '.join(s['type'] for s in steps)}")
    if not merges:
        raise _strange("it joins no bytes, and llama.cpp asks for at least one pair that is joined")
    pre = SPLITS.get(split or "")
    if pre is None:
        raise _strange(f"it cuts texts by {split!r}" if split else "it does not cut texts into words")
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise _strange(f"ignore_merges={model.get('ignore_merges')} does not go with how it cuts texts ({pre})")
    tokens, types = _filled(tokenizer, said, rows)
    return Tables("gpt2", pre, tokens, types, merges=merges)


# ---- SentencePiece: Llama 1 and 2, Mistral ---------------------------------------------------------------------------


def _by_scores(tokenizer: Any, said: Mapping[str, Any], steps: list[dict[str, Any]], rows: int) -> Tables:
    """llama.cpp joins the neighbours that make the token of the highest score; transformers goes by a list of pairs."""
    prefix = _space_prefix(said, steps)
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in said["model"]["merges"]]
    tokens, types = _filled(tokenizer, said, rows)
    known = said["model"]["vocab"]
    kind = package().TokenType
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = int(kind.BYTE)
    if types.count(int(kind.BYTE)) != 256:
        raise _strange("it has no token for each byte")
    if tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = int(kind.UNKNOWN)
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(merges):
        places.setdefault("".join(pair), []).append(place)
    pairs = set(merges)
    for token, found in places.items():
        if found[-1] - found[0] >= len(found):
            raise _strange(f"the pairs that make {token!r} stand apart in its list, so that no scores say the same")
    for token, type_ in zip(tokens, types, strict=True):
        if type_ == int(kind.NORMAL) and (lost := next((p for p in _halves(token, known) if p not in pairs), None)):
            raise _strange(f"it does not join {lost[0]!r} and {lost[1]!r}, and llama.cpp would")
    scores = [-float(places[token][0] + 1) if token in places else 0.0 for token in tokens]
    return Tables("llama", "default", tokens, types, scores=scores, space_prefix=prefix)


def _halves(token: str, known: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    for i in range(1, len(token)):
        if token[:i] in known and token[i:] in known:
            yield token[:i], token[i:]


def _space_prefix(said: Mapping[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether a space is put before each text; spaces must become marks, and nothing else may happen."""
    normal = _steps(said["normalizer"])
    prefix = any(s["type"] == "Prepend" and s["prepend"] == MARK for s in normal)
    marks = any(s["type"] == "Replace" and s["pattern"] == {"String": " "} and s["content"] == MARK for s in normal)
    meta = [s for s in steps if s["type"] == "Metaspace" and not s.get("split", True)]
    if meta:
        prefix, marks = prefix or meta[0]["prepend_scheme"] in ("always", "first"), True
    if not marks or len(steps) != len(meta) or any(s["type"] not in ("Prepend", "Replace") for s in normal):
        raise _strange(f"it treats texts by {', '.join(s['type'] for s in (*normal, *steps)) or 'nothing'}")
    return prefix
