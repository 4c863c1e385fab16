"""From what a client sends to token ids: a conversation, a text, or tokens themselves."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from coadapt.data.segments import Framing
from coadapt.serving.errors import Refusal
from coadapt.serving.schemas import Message


def of_conversation(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, framing: Framing | None, who: str
) -> tuple[int, ...]:
    """A conversation as it was put to the adapters in training, else through the tokenizer's chat template.

    Args:
        framing: of the adapters' training; None where nothing is known of one.
        who: the model, for errors.

    Raises:
        Refusal: there is neither, or it has no place for such a conversation.
    """
    if framing is not None and framing.style != "chat":
        text = _as_roles(messages) if framing.style == "roles" else framing.prompt(_alone(messages, who), tokenizer)
        return of_text(text, tokenizer)
    if tokenizer.chat_template is None:
        raise Refusal(
            400,
            f"{who} cannot chat: its tokenizer has no chat template, and nothing is known of a training. Ask it by "
            "/v1/completions.",
            param="messages",
            code="no_chat_template",
        )
    turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        message = f"The model's chat template refuses this conversation: {error}"
        raise Refusal(400, message, param="messages", code="refused_by_template") from error
    return _encoded(str(text), tokenizer, special=False)


def of_text(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """A text, with the tokenizer's own first and last tokens."""
    return _encoded(text, tokenizer, special=True)


def of_tokens(tokens: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """Tokens as they are. Raises Refusal where the model has no such token."""
    if strange := [token for token in tokens if token >= vocabulary]:
        message = f"prompt: the model has no token {strange[0]}; its tokens go from 0 to {vocabulary - 1}."
        raise Refusal(400, message, param="prompt", code="invalid_value")
    if not tokens:
        raise Refusal(400, "prompt: there are no tokens in it.", param="prompt", code="invalid_value")
    return tuple(tokens)


def prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a completion: one, or several. Raises Refusal where there is none."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise Refusal(400, "prompt: the list is empty.", param="prompt", code="invalid_value")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> tuple[int, ...]:
    found = tuple(tokenizer.encode(text, add_special_tokens=special, verbose=False))
    if not found:
        raise Refusal(400, "The prompt is empty: there is no token to go on from.", code="invalid_value")
    return found


def _alone(messages: Sequence[Message], who: str) -> str:
    """The one question. Raises Refusal where there is more: the training had no place for it."""
    if [message.role for message in messages] == ["user"]:
        return messages[0].text
    raise Refusal(
        400,
        f"{who} was trained on single questions, without a chat template: send one message, of the user "
        f"(found: {', '.join(message.role for message in messages[:8])}).",
        param="messages",
        code="one_message_only",
    )


def _as_roles(messages: Sequence[Message]) -> str:
    return "".join(f"{message.role}: {message.text}\n" for message in messages) + "assistant:"
