"""The classes that wrap a model, one for each method: a face of what `inject_adapter_in_model` or a view does."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from coadapt.config import CONFIGS, PeftConfig, PeftType, VirtualTokensConfig

from . import configs as configs  # all methods are known from now on
from .injection import Injected, inject_adapter_in_model, injected
from .views import PeftModel


class BaseTuner(nn.Module):
    """A model with adapters: `LoraModel(model, config, "default")` puts one into it, and is called as the model is.

    What `PeftModel.base_model` gives is one, too: of the view's adapters, which stand beside the model.
    """

    kind: ClassVar[str] = ""
    """The method's name; empty: any."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | Mapping[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        if self.kind and str(config.peft_type) != self.kind:
            raise ValueError(f"A {type(self).__name__} has adapters of {self.kind}; got a {type(config).__name__}.")
        inject_adapter_in_model(config, model, adapter_name, low_cpu_mem_usage, state_dict)
        self.model = model
        self.__dict__["steered"] = injected(model)

    @classmethod
    def of(cls, view: PeftModel) -> Self:
        """The face of a view."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.model, made.adapters = view.base, view.adapters
        made.__dict__["steered"] = view
        return made

    steered: PeftModel | Injected

    @property
    def view(self) -> PeftModel:
        """What holds the adapters."""
        return self.steered.view if isinstance(self.steered, Injected) else self.steered

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's, adapted."""
        return (self.model if isinstance(self.steered, Injected) else self.view)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", ()):
                raise
            view = self.view
            return getattr(view if self.steered is view and hasattr(type(view), name) else self.model, name)

    # ---- steering ----------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configurations of all adapters."""
        return self.view.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """The names of what is active."""
        return self.steered.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The one that is active, or a list."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes adapters active. What trains stays as it is."""
        self.steered.set_adapter(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes an adapter away."""
        self.steered.delete_adapter(adapter_name)
        if isinstance(self.steered, Injected):
            _forget(self.model, adapter_name)

    def enable_adapter_layers(self) -> None:
        """Undoes `disable_adapter_layers`."""
        if isinstance(self.steered, Injected):
            self.steered.enable_adapters(True)
        else:
            self.steered.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Nothing takes part in calls."""
        if isinstance(self.steered, Injected):
            self.steered.enable_adapters(False)
        else:
            self.steered.disable_adapter_layers()

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *args: Any, **options: Any
    ) -> None:
        """As `PeftModel.add_weighted_adapter`."""
        self.view.add_weighted_adapter(adapters, weights, adapter_name, *args, **options)
        if isinstance(self.steered, Injected):
            self.steered.hold(adapter_name)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Puts what is active, or these, into the model's weights."""
        if isinstance(self.steered, Injected):
            self.steered.merge(safe_merge, adapter_names)
        else:
            self.steered.merge_adapter(adapter_names)

    def unmerge_adapter(self) -> None:
        """Puts the model's own weights back, bit for bit."""
        self.view.unmerge_adapter()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merges for good, and gives the model back, without adapters."""
        if isinstance(self.steered, Injected):
            self.steered.merge_and_unload(adapter_names=adapter_names)
            _forget(self.model)
        else:
            self.steered.merge_and_unload(adapter_names=adapter_names)
        return self.model

    def unload(self) -> nn.Module:
        """Gives the model back as it was."""
        if isinstance(self.steered, Injected):
            self.steered.get_base_layer()
            _forget(self.model)
        else:
            self.steered.unload()
        return self.model


def _forget(model: nn.Module, name: str | None = None) -> None:
    """Takes off the model what tells of adapters that are gone."""
    known: dict[str, Any] = model.__dict__.get("peft_config", {})
    for gone in list(known) if name is None else [name]:
        known.pop(gone, None)
    if model._modules.get(configs.INJECTED, model) is None:
        del model._modules[configs.INJECTED]
        model.__dict__.pop("peft_config", None)


MODELS: dict[str, type[BaseTuner]] = {
    kind: type(f"{cls.__name__.removesuffix('Config')}Model", (BaseTuner,), {"kind": kind, "__module__": __name__})
    for kind, cls in CONFIGS.items()
    if kind.isupper() and kind != "XLORA" and not issubclass(cls, VirtualTokensConfig)
}
"""Method -> the class that wraps a model with it."""
globals().update({cls.__name__: cls for cls in MODELS.values()})

PEFT_TYPE_TO_TUNER_MAPPING: dict[Any, type[BaseTuner]] = {t: MODELS[t] for t in PeftType if t in MODELS}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = PEFT_TYPE_TO_TUNER_MAPPING
"""Every view can mix methods."""


def face_of(view: PeftModel) -> BaseTuner | None:
    """A view's adapters as the class of their method; of several methods as a `BaseTuner`, of virtual tokens None."""
    found = list(view.peft_config.values())
    if not found or any(isinstance(config, VirtualTokensConfig) for config in found):
        return None
    kinds = {str(config.peft_type) for config in found}
    return (MODELS.get(kinds.pop(), BaseTuner) if len(kinds) == 1 else BaseTuner).of(view)
