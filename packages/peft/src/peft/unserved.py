"""Names that exist, so that imports go through, and say what to do instead when they are used."""

from collections.abc import Callable
from typing import Any, NoReturn

_INSTEAD = {
    "ArrowConfig": "Use coadapt.Arrow, a router: model.set_adapter(Sum('a', 'b', weights=Arrow(...))).",
    "compose_cartridge_adapters": 'Load them and combine: model.combine("a >> b", adapter_name="both").',
    "convert_to_lora": "Use model.combine(name, 'svd', r=..., adapter_name=...), which reports the error, too.",
    "create_arrow_model": "Use coadapt.Arrow, a router over adapters that are loaded one by one.",
    "get_eva_state_dict": "Use initialize_lora_eva_weights(model, dataloader).",
    "get_layer_status": "Ask model.peft_config, model.active_adapters and model.trainable().",
    "get_model_status": "Ask model.peft_config, model.active_adapters and model.trainable().",
    "ShadowConfig": "There is no such method in coadapt.",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": "One class, PeftModel, serves all methods, and mixes them.",
    "PEFT_TYPE_TO_TUNER_MAPPING": "One class, PeftModel, serves all methods.",
    "replace_lora_weights_loftq": "Use LoraConfig(init_lora_weights='loftq').",
    "save_as_lora": "Use model.combine(name, 'svd', r=..., adapter_name=...), and save that.",
    "factorization": "LoKr's factors are found from the layer's shape by LoKrConfig.",
    "hotswap_adapter": "Attach both adapters and switch: model.set_adapter(name) costs nothing.",
    "register_peft_method": "Use coadapt.core.method.register.",
}
_ENDS = {
    "_MAPPING": "Places are found from a model's structure; leave target_modules out, or name them.",
    "Model": "Use get_peft_model(model, config), or inject_adapter_in_model(config, model).",
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
    functions = "bloom_model_postprocess_past_key_value", "register_peft_method", "replace_lora_weights_loftq"
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
