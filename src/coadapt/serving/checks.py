"""What a request may ask."""

import math

from .request import Request


def check(request: Request, vocabulary: int, tokens: int | None, positions: int | None) -> None:
    """Raises ValueError for a request that the model cannot answer, or that is longer than `tokens`."""
    asked = request.tokens
    wrong = {
        "The prompt has no tokens.": not asked,
        f"max_tokens={request.max_tokens}: an answer has at least one token.": request.max_tokens < 1,
        f"temperature={request.temperature} is no number of at least 0.": not 0 <= request.temperature < math.inf,
        f"top_p={request.top_p} is not above 0 and at most 1.": not 0 < request.top_p <= 1,
        f"top_k={request.top_k} is below 0.": request.top_k < 0,
        f"logprobs={request.logprobs} is below 0.": request.logprobs is not None and request.logprobs < 0,
        "A stop text is empty.": "" in request.stop,
        f"The prompt has tokens that the model does not have; they go from 0 to {vocabulary - 1}.": bool(asked)
        and not (min(asked) >= 0 and max(asked) < vocabulary),
    }
    if found := [reason for reason, is_so in wrong.items() if is_so]:
        raise ValueError(" ".join(found))
    check_length(request, tokens, "this server takes", 0)
    check_length(request, positions, "the model takes", 0)


def check_length(request: Request, limit: int | None, who: str, virtual: int) -> None:
    """Raises ValueError where prompt and answer have more tokens than `limit`, less those that adapters take."""
    count = len(request.tokens)
    if limit is not None and count + request.max_tokens + virtual > limit:
        less = f" ({virtual} of them for the adapters' virtual tokens)" if virtual else ""
        raise ValueError(
            f"The prompt has {count} tokens and max_tokens is {request.max_tokens}, together "
            f"{count + request.max_tokens}; {who} {limit}{less}. Ask something shorter, or for a shorter answer."
        )
