"""What a client asks of the engine, and what it hears back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Finish = Literal["stop", "length", "cancelled", "refused", "error"]
"""An end token or a stop text; no tokens left; the client went away; its adapters cannot answer it, as was found when
they were there; the engine could not go on."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of the running batch, from its prompt to its last token."""

    tokens: tuple[int, ...]
    """The prompt, as token ids."""
    adapters: str | None = None
    """The composition that answers, as `adapter_names` takes one for a row; None for the base alone."""
    max_tokens: int
    """Tokens of the answer, at most."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 among all."""
    seed: int | None = None
    """The same seed draws the same answer, whatever else is in the batch; None draws anew each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told beside each token, with log-probabilities; None for none at all."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A token of the answer, and how likely the model held it (before temperature, top_p and top_k)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there, with their log-probabilities."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer, as soon as it is known how it is spelt."""

    text: str
    tokens: int
    """How many tokens of the answer there are so far."""
    chosen: tuple[Chosen, ...] = ()
    """The tokens of this piece, where the request asked for `logprobs`."""
    finish: Finish | None = None
    """Set on the last piece, and only there."""
    error: str | None = None
    """What went wrong, where `finish` is "refused" or "error"; None where only the log is to tell."""


Hear = Callable[[Piece], None]
"""Gets each piece, on the engine's thread; the one with `finish` is the last. It must return at once."""
