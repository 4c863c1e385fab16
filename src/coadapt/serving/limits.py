"""How much of a server one request can have."""

from dataclasses import dataclass

from coadapt.serving.errors import Refusal
from coadapt.serving.schemas import Chat, Sampling

USUAL = 16
"""Tokens of a completion where the client does not say, as the protocol has it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Set once, for all clients."""

    body: int = 2**20
    """Bytes of a request's body."""
    max_tokens: int = 1024
    """Tokens of one answer."""
    choices: int = 16
    """Answers of one request: of each prompt as many as it asks for."""
    body_seconds: float = 30.0
    """How long a client may take to send its body."""

    def check_choices(self, prompts: int, n: int) -> None:
        """Raises Refusal where one request asks for too many answers."""
        if prompts * n > self.choices:
            shown = f"n={n}" if prompts == 1 else f"{prompts} prompts with n={n}"
            message = f"{shown} asks for {prompts * n} answers; this server gives {self.choices} to one request."
            raise Refusal(400, message, param="n" if prompts == 1 else "prompt", code="too_many_choices")

    def answer(self, asked: Sampling, prompt: int, room: int | None) -> int:
        """Tokens of the answer, at most.

        Args:
            prompt: tokens of the prompt.
            room: tokens that the model takes, prompt and answer together; None where it does not say.

        Raises:
            Refusal: prompt and answer do not fit.
        """
        left = self.max_tokens if room is None else room - prompt
        if left < 1:
            message = f"The prompt has {prompt} tokens; this model takes {room}, with at least one of an answer."
            param = "messages" if isinstance(asked, Chat) else "prompt"
            raise Refusal(400, message, param=param, code="context_length_exceeded")
        name, wanted = _wanted(asked)
        if wanted is None:
            return min(self.max_tokens, left, self.max_tokens if isinstance(asked, Chat) else USUAL)
        if wanted > self.max_tokens:
            message = f"{name}={wanted} is more than this server gives, {self.max_tokens} (--max-tokens)."
            raise Refusal(400, message, param=name, code="invalid_value")
        if wanted > left:
            message = f"The prompt has {prompt} tokens, and {name}={wanted} asks for more; this model takes {room}."
            raise Refusal(400, message, param=name, code="context_length_exceeded")
        return wanted


def _wanted(asked: Sampling) -> tuple[str, int | None]:
    if not isinstance(asked, Chat) or asked.max_completion_tokens is None:
        return "max_tokens", asked.max_tokens
    if asked.max_tokens not in (None, asked.max_completion_tokens):
        message = "max_tokens and max_completion_tokens say the same and differ. Give the second alone."
        raise Refusal(400, message, param="max_tokens", code="invalid_value")
    return "max_completion_tokens", asked.max_completion_tokens
