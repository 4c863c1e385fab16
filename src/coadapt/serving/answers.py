"""Answers as the protocol writes them: whole, or in chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from coadapt.serving.request import Chosen, Piece

Json = dict[str, Any]


class Answer(ABC):
    """One HTTP request's answer, of one or several choices.

    Args:
        model: as the client named it.
        prompt_tokens: of all prompts.
        choices: how many there are.
        usage: chunks tell `usage`, null but in the last.
    """

    mark: str
    whole_kind: str
    chunk_kind: str

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, *, prompt_tokens: int, choices: int, usage: bool = False
    ) -> None:
        self.tokenizer, self.prompt_tokens, self.usage = tokenizer, prompt_tokens, usage
        self.tokens = [0] * choices
        self.begun = [False] * choices
        self.texts = [""] * choices
        self._head = {"id": f"{self.mark}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def chunk(self, number: int, piece: Piece) -> Json:
        """A piece of one choice."""
        choice = {
            "index": number,
            **self._part(number, piece),
            "logprobs": self._logprobs(piece.chosen, len(self.texts[number])),
            "finish_reason": piece.finish,
        }
        self.begun[number] = True
        self.tokens[number] = piece.tokens
        self.texts[number] += piece.text
        return self._chunk([choice], {"usage": None} if self.usage else {})

    def last(self) -> Json:
        """The chunk with the usage."""
        return self._chunk([], {"usage": self._used(self.tokens)})

    def _chunk(self, choices: list[Json], more: Json) -> Json:
        return {**self._head, "object": self.chunk_kind, "choices": choices, **more}

    def whole(self, said: Sequence[Sequence[Piece]]) -> Json:
        """All pieces of all choices, at once."""
        choices = [
            {
                "index": number,
                **self._all("".join(piece.text for piece in pieces)),
                "logprobs": self._logprobs([chosen for piece in pieces for chosen in piece.chosen], 0),
                "finish_reason": pieces[-1].finish,
            }
            for number, pieces in enumerate(said)
        ]
        used = self._used([pieces[-1].tokens for pieces in said])
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": used}

    def _used(self, tokens: Sequence[int]) -> Json:
        answered = sum(tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self.prompt_tokens + answered,
        }

    def _spelt(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    @abstractmethod
    def _part(self, number: int, piece: Piece) -> Json: ...

    @abstractmethod
    def _all(self, text: str) -> Json: ...

    @abstractmethod
    def _logprobs(self, chosen: Sequence[Chosen], at: int) -> Mapping[str, Any] | None: ...


class ChatAnswer(Answer):
    """Of POST /v1/chat/completions."""

    mark, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _part(self, number: int, piece: Piece) -> Json:
        role = {} if self.begun[number] else {"role": "assistant"}
        return {"delta": {**role, **({"content": piece.text} if piece.text or role else {})}}

    def _all(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, chosen: Sequence[Chosen], at: int) -> Mapping[str, Any] | None:
        if not chosen:
            return None
        told = [
            {**self._likely(one.token, one.logprob), "top_logprobs": [self._likely(*other) for other in one.top]}
            for one in chosen
        ]
        return {"content": told, "refusal": None}

    def _likely(self, token: int, logprob: float) -> Json:
        text = self._spelt(token)
        # A token can be a part of a character; which of its bytes, nobody says.
        spelt = None if "�" in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": spelt}


class CompletionAnswer(Answer):
    """Of POST /v1/completions."""

    mark, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _part(self, number: int, piece: Piece) -> Json:
        return {"text": piece.text}

    def _all(self, text: str) -> Json:
        return {"text": text}

    def _logprobs(self, chosen: Sequence[Chosen], at: int) -> Mapping[str, Any] | None:
        if not chosen:
            return None
        spelt = [self._spelt(one.token) for one in chosen]
        return {
            "tokens": spelt,
            "token_logprobs": [one.logprob for one in chosen],
            "top_logprobs": [{self._spelt(token): value for token, value in one.top} for one in chosen],
            "text_offset": [at + len("".join(spelt[:number])) for number in range(len(spelt))],
        }
