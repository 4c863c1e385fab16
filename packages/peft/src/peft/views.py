"""PeftModel: coadapt's, and what transformers' Trainer does with one that it takes for the field's."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

import coadapt.auto
import coadapt.model
from coadapt.core import driving
from coadapt.core.adapter import Adapter
from coadapt.core.status import TunerLayerStatus, TunerModelStatus
from coadapt.formats.files import CONFIG, read_json

from . import configs as configs  # makes configurations assignable


class PeftModel(coadapt.model.PeftModel):
    """A view of a base, as in coadapt; a Trainer's checkpoint is an adapter folder, and is read into its place."""

    _resting: Any = None
    """What is active again after `enable_adapter_layers`; None while adapters are enabled."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """As in coadapt.

        Args:
            path_initial_model_for_weight_conversion: not read: what a start took from the base is written along.
            state_dict: taken as there, where it is this view's own.

        Raises:
            ValueError: an option that has no effect, or the state of something else.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise ValueError(
                "path_initial_model_for_weight_conversion has no effect: the base is as it was, and what PiSSA and "
                "its relatives took from it is written along. Leave it out."
            )
        if state_dict is not None and (strange := state_dict.keys() - self.state_dict().keys()):
            raise ValueError(f"state_dict is not this model's: it holds {sorted(strange)[0]!r}. Leave it out.")
        super().save_pretrained(
            save_directory, safe_serialization, selected_adapters, save_embedding_layers, is_main_process
        )

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        """As in coadapt; but the weights of one that is attached under this name are read into it, as there."""
        if adapter_name not in self.peft_config:
            super().load_adapter(model_id, adapter_name, is_trainable, autocast_adapter_dtype, **kwargs)
            return
        here = self.get_adapter(adapter_name)
        beside = PeftModel(self.base)
        try:
            beside.load_adapter(model_id, adapter_name, True, autocast_adapter_dtype, **kwargs)
            found = beside.get_adapter(adapter_name)
            driving.forget(here)
            here.load_state_dict(found.state_dict())
        finally:
            beside.unload()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        config: coadapt.PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """As in coadapt; the class is that for the folder's task, as there."""
        made: Any = cls
        file = Path(model_id, subfolder or "", CONFIG)
        if cls is PeftModel and (config is not None or file.is_file()):
            made = _class_for(read_json(file).get("task_type") if config is None else config.task_type)
        above: Any = super(PeftModel, made)
        return above.from_pretrained(
            model, model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, subfolder, **kwargs
        )

    # ---- as the field's models are, without a counterpart in coadapt -------------------------------------------------

    @property
    def base_model(self) -> Any:
        """The model with its adapters, as a `LoraModel` or whatever they are; of virtual tokens as in coadapt."""
        from .wrapping import face_of  # which is made of views

        return face_of(self) or super().base_model

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        """As in coadapt; while adapters are disabled, it is what comes back with them."""
        if self._resting is None:
            super().set_adapter(adapter_name)
        else:
            self._resting = self.checked(adapter_name, new=True)

    def disable_adapter_layers(self) -> None:
        """Nothing takes part in calls until `enable_adapter_layers`."""
        if self._resting is None:
            before = self._node
            super().set_adapter([])
            self._resting = before

    def enable_adapter_layers(self) -> None:
        """Undoes `disable_adapter_layers`."""
        if self._resting is not None:
            before, self._resting = self._resting, None
            super().set_adapter(before)

    def exchange(self, adapter: Adapter) -> None:
        """Puts another adapter into the place of the one of its name; what is active stays."""
        if self._merged is not None:
            raise ValueError(f"{self._merged.node!r} is merged into the base; unmerge_adapter() before a hot swap.")
        node, name = self._node, adapter.name
        super().set_adapter([])
        self._take_away(name)
        self._install(adapter)
        super().set_adapter(node)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """As in coadapt, by the names of modules in `base_model`, as there."""
        return [replace(status, name=f"model.{status.name}") for status in super().get_layer_status()]

    def get_model_status(self) -> TunerModelStatus:
        """As in coadapt; the adapter model is `base_model`."""
        return replace(super().get_model_status(), adapter_model_type=type(self.base_model).__name__)

    @property
    def active_peft_config(self) -> coadapt.PeftConfig:
        """The configuration of the one active adapter."""
        return self.peft_config[self.active_adapter]


class PeftModelForCausalLM(PeftModel):
    """The class that programs look for by its name; nothing else is different. So with the others."""


class PeftModelForFeatureExtraction(PeftModel): ...


class PeftModelForQuestionAnswering(PeftModel): ...


class PeftModelForSeq2SeqLM(PeftModel): ...


class PeftModelForSequenceClassification(PeftModel): ...


class PeftModelForTokenClassification(PeftModel): ...


PeftMixedModel = PeftModel
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
}


def _class_for(task: str | None) -> type[PeftModel]:
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(task), PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: coadapt.PeftConfig,
    adapter_name: str | None = None,
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """As `coadapt.get_peft_model`."""
    view = model if isinstance(model, PeftModel) else _class_for(peft_config.task_type)(model)
    try:
        coadapt.model.get_peft_model(
            view, peft_config, adapter_name, mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage
        )
    except BaseException:
        if view is not model:
            view.unload()
        raise
    return view


class _Here:
    """Has the classes that load a base along make this module's views."""

    view: ClassVar[type[coadapt.model.PeftModel]] = PeftModel


class AutoPeftModelForCausalLM(_Here, coadapt.auto.AutoPeftModelForCausalLM): ...


class AutoPeftModelForFeatureExtraction(_Here, coadapt.auto.AutoPeftModelForFeatureExtraction): ...


class AutoPeftModelForQuestionAnswering(_Here, coadapt.auto.AutoPeftModelForQuestionAnswering): ...


class AutoPeftModelForSeq2SeqLM(_Here, coadapt.auto.AutoPeftModelForSeq2SeqLM): ...


class AutoPeftModelForSequenceClassification(_Here, coadapt.auto.AutoPeftModelForSequenceClassification): ...


class AutoPeftModelForTokenClassification(_Here, coadapt.auto.AutoPeftModelForTokenClassification): ...


class AutoPeftModel:
    """By the folder's own `task_type`."""

    _BY_TASK: ClassVar[dict[str, Any]] = {
        "CAUSAL_LM": AutoPeftModelForCausalLM,
        "FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction,
        "QUESTION_ANS": AutoPeftModelForQuestionAnswering,
        "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
        "SEQ_CLS": AutoPeftModelForSequenceClassification,
        "TOKEN_CLS": AutoPeftModelForTokenClassification,
    }

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> PeftModel:
        """Loads the base that an adapter's folder names, as the class for its task does, and the adapter onto it.

        Raises:
            ValueError: the folder names no task.
        """
        task = str(coadapt.PeftConfig.from_pretrained(folder).task_type)
        if task not in cls._BY_TASK:
            raise ValueError(f"{folder} does not say which task it is for; use AutoPeftModelForCausalLM, say.")
        return cls._BY_TASK[task].from_pretrained(folder, **kwargs)
