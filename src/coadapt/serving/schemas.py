"""What a client may ask, field by field. Whatever else it sends is refused by name, unless it means nothing."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coadapt.config import did_you_mean
from coadapt.serving.errors import Refusal

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_p": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of the protocol that this server does not serve -> values that ask for nothing, which pass."""


OF_TOOLS = ("tool_calls", "tool_call_id", "function_call")
"""Fields of messages that are told of together."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Sampling(_Body):
    """What chat and completions have in common."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    n: Annotated[int, Field(ge=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Who asks, for the client's own books; nothing here depends on it."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Part(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


Token = Annotated[int, Field(ge=0)]


class Completion(Sampling):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Load(_Body):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class Unload(_Body):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str


B = TypeVar("B", bound=_Body)


def read(kind: type[B], body: bytes) -> B:
    """The body of a request.

    Raises:
        Refusal: it is no JSON, or asks for something that is not served, unknown, or of another form.
    """
    values = {name: value for name, value in _json(body).items() if value is not None}
    known = kind.model_fields
    for name in [name for name in values if name not in known]:
        if issubclass(kind, Sampling) and name in UNSUPPORTED:
            _refuse_unsupported(name, values.pop(name))
        else:
            _refuse_unknown(name, known)
    if issubclass(kind, Chat):
        _refuse_in_messages(values.get("messages"))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first(error) from None


def _json(body: bytes) -> dict[str, Any]:
    def no_number(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON")

    try:
        values = json.loads(body, parse_constant=no_number)
        # Half of a surrogate pair is a text for Python, and for nothing that comes behind.
        json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise Refusal(400, "The body is nested too deeply.", code="invalid_json") from None
    except UnicodeEncodeError:
        message = "The body has half of a surrogate pair (\\ud800 to \\udfff by itself), which is no text."
        raise Refusal(400, message, code="invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"The body is no JSON: {error}.", code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refusal(400, "The body is no JSON object: it must begin with { and name fields.", code="invalid_json")
    return values


def _refuse_unsupported(name: str, value: Any) -> None:
    nothing = UNSUPPORTED[name]
    if any(type(value) is type(one) and value == one for one in nothing) or (
        isinstance(value, float) and value in [one for one in nothing if type(one) is int]
    ):
        return
    passes = f" Leave it out{' or give ' + json.dumps(nothing[0]) if nothing else ''}."
    raise Refusal(400, f"{name} is not supported by this server.{passes}", param=name, code="unsupported_parameter")


def _refuse_unknown(name: str, known: Mapping[str, Any]) -> NoReturn:
    shown = name[:64]
    hint = did_you_mean(shown, known) or f" There are: {', '.join(known)}."
    message = f"There is no field {shown!r}.{hint}"
    raise Refusal(400, message, param=shown, code="unknown_parameter")


def _refuse_in_messages(turns: Any) -> None:
    """What messages can hold elsewhere, by name: a validation would only say that it has another form."""
    listed: list[Any] = turns if isinstance(turns, list) else []
    for number, turn in enumerate(listed):
        if not isinstance(turn, dict):
            continue
        for name in [name for name, value in turn.items() if value is None and name != "content"]:
            del turn[name]
        where = f"messages[{number}]"
        if other := [name for name in turn if name not in (*Message.model_fields, *OF_TOOLS)]:
            told = f"{where}.{other[0][:64]} is not supported by this server. Leave it out."
            raise Refusal(400, told, param=where, code="unsupported")
        content: Any = turn.get("content")
        if turn.get("role") in ("tool", "function") or turn.get("tool_calls"):
            raise Refusal(400, f"{where}: tools are not supported by this server.", param=where, code="unsupported")
        kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        if other := [kind for kind in kinds if isinstance(kind, str) and kind != "text"]:
            told = f"{where}: {other[0]} is not supported by this server, which takes text only."
            raise Refusal(400, told, param=f"{where}.content", code="unsupported")


def _first(error: ValidationError) -> Refusal:
    """The first of what is wrong; of the ways in which a value is none of several kinds, the one that it is nearest."""
    found = error.errors(include_url=False, include_input=False)
    own = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    said = max(own, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where = _place(said["loc"])
    if said["loc"][:1] == ("prompt",) and said["type"].endswith("_type"):
        message = "prompt: a text, several texts, token ids or several lists of them; nothing else, and not mixed."
        return Refusal(400, message, param="prompt", code="invalid_value")
    code = "missing_parameter" if said["type"] == "missing" else "invalid_value"
    return Refusal(400, f"{where}: {said['msg']}.", param=where, code=code)


def _place(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`: less the names of the kinds that pydantic tried."""
    parts = [part for part in loc if isinstance(part, int) or part.isidentifier()]
    kept = [part for part in parts if part not in ("str", "int")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in kept).lstrip(".") or "body"
