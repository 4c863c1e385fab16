"""An answer's text, as its tokens come: never half a character, nothing of a stop text."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_BEFORE = 8
"""Tokens of the prompt that say how the answer's first one is spelt: with a space, or without."""
_HALF = "\ufffd"


def backend(tokenizer: Any) -> Any:
    """What spells tokens one by one. Raises ValueError for a tokenizer without it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} cannot be served; that needs a fast tokenizer (tokenizer.json).")
    return tokenizer.backend_tokenizer


class Spelling:
    """Tokens in, text out.

    Args:
        backend: of the tokenizer.
        prompt: the tokens before the answer.
        stop: texts that end it.
    """

    def __init__(self, backend: Any, prompt: Sequence[int], stop: Sequence[str]) -> None:
        before = list(prompt[-_BEFORE:])
        if backend.decode(before, skip_special_tokens=True).endswith(_HALF):
            before = []  # the rest of a character would come with all that stands before it
        self._backend, self._stop = backend, tuple(stop)
        self._stream = DecodeStream(ids=before, skip_special_tokens=True)
        self._held = ""
        self.stopped = False
        """Whether a stop text has come."""

    def add(self, token: int) -> str:
        """The text that is certain now: what can be the beginning of a stop text waits."""
        text = self._stream.step(self._backend, token) or ""
        if not self._stop:
            return text
        if not text:
            return ""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        waits = max(_begun(text, stop) for stop in self._stop)
        self._held = text[len(text) - waits :]
        return text[: len(text) - waits]

    def rest(self) -> str:
        """What waited for a stop text that did not come."""
        text, self._held = self._held, ""
        return text


def _begun(text: str, stop: str) -> int:
    """How many of the text's last characters are the first ones of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
