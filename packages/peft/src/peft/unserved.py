"""Names that exist, so that imports go through, and say what to do instead when they are used."""

from collections.abc import Callable
from typing import Any, NoReturn

_INSTEAD = {
    "XLoraModel": "Use get_peft_model(model, XLoraConfig(...)), which loads the adapters and routes among them.",
    "LoraRuntimeConfig": "DoRA's lengths are worked out where the weight lies; there is nothing to set.",
    "CPTEmbedding": "Its values are those of model.get_adapter(name).",
    "CartridgeEncoder": "Its values are those of model.get_adapter(name).",
    "PrefixEncoder": "Its values are those of model.get_adapter(name).",
    "PromptEmbedding": "Its values are those of model.get_adapter(name).",
    "PromptEncoder": "Its values are those of model.get_adapter(name).",
    "bloom_model_postprocess_past_key_value": "A prefix is joined inside of the attention call, whatever the model.",
    "fsdp_auto_wrap_policy": "It goes by wrapped layers, and there are none. Use FSDP2 (fully_shard).",
    "factorization": "LoKr's factors are found from the layer's shape by LoKrConfig.",
    "register_peft_method": "Use coadapt.core.method.register.",
}
_ENDS = {
    "_MAPPING": "Places are found from a model's structure; leave target_modules out, or name them.",
    "Layer": "No layer is wrapped: adapters stand beside the model, whose layers keep their class.",
}


def _refuse(name: str) -> NoReturn:
    instead = _INSTEAD.get(name) or next((text for end, text in _ENDS.items() if name.endswith(end)), "")
    raise NotImplementedError(f"coadapt stands here as peft and does not serve {name}. {instead}".rstrip())


def unserved_function(name: str) -> Callable[..., NoReturn]:
    """A function that raises when it is called."""

    def function(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name)

    function.__name__ = function.__qualname__ = name
    return function


def unserved_class(name: str, *bases: type[Any]) -> type[Any]:
    """A class that cannot be made an instance of: `isinstance(x, it)` is False."""

    def new(cls: type[Any], *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(cls.__name__)

    return type(name, bases, {"__new__": new, "__module__": "peft"})


class UnservedMapping(dict[Any, Any]):
    """A mapping that raises when it is looked into."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __getitem__(self, key: Any) -> NoReturn:
        _refuse(self.name)

    def __contains__(self, key: Any) -> NoReturn:
        _refuse(self.name)

    def __iter__(self) -> NoReturn:
        _refuse(self.name)

    def __len__(self) -> NoReturn:
        _refuse(self.name)

    def get(self, key: Any, default: Any = None) -> NoReturn:
        _refuse(self.name)

    def keys(self) -> NoReturn:
        _refuse(self.name)

    def values(self) -> NoReturn:
        _refuse(self.name)

    def items(self) -> NoReturn:
        _refuse(self.name)


def of_utils(name: str) -> Any:
    """What `peft.utils` has beside what is served."""
    functions = "bloom_model_postprocess_past_key_value", "register_peft_method"
    if name in functions or (name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MAPPING")):
        return __getattr__(name)
    raise AttributeError(f"module 'peft.utils' (coadapt's) has no attribute {name!r}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name.endswith("_MAPPING"):
        made: Any = UnservedMapping(name)
    elif name[0].isupper():
        made = unserved_class(name)
    else:
        made = unserved_function(name)
    globals()[name] = made
    return made
