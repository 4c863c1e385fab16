"""`AutoPeftModelFor...`: the base and its adapters, from the adapter's folder alone."""

import json
from pathlib import Path
from typing import Any, ClassVar

import transformers

from .config import PeftConfig
from .formats import files
from .model import PeftModel


class _AutoPeftModel:
    loader: ClassVar[str]
    view: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self) -> None:
        raise TypeError(
            f"{type(self).__name__} is not made directly; call {type(self).__name__}.from_pretrained(folder)."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads the base that the adapter's folder names, and the adapter onto it.

        Args:
            kwargs: for the base's `from_pretrained` (dtype, device_map ...).

        Raises:
            ValueError: the folder does not say what its base is.
        """
        folder = Path(pretrained_model_name_or_path)
        files.settle(folder)
        config = PeftConfig.from_pretrained(_first_adapter(folder))
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{folder} does not say which base it is for. Load that yourself, and use "
                "PeftModel.from_pretrained(base, folder)."
            )
        if config.revision is not None:
            kwargs.setdefault("revision", config.revision)
        loader: Any = getattr(transformers, cls.loader)
        base = loader.from_pretrained(config.base_model_name_or_path, **kwargs)
        return cls.view.from_pretrained(base, folder, adapter_name, is_trainable)


def _first_adapter(folder: Path) -> Path:
    listed = folder / "composition.json"
    if not listed.is_file():
        return folder
    name = json.loads(listed.read_text("utf-8"))["adapters"][0]
    return folder if name == "default" else folder / name


class AutoPeftModelForCausalLM(_AutoPeftModel):
    loader = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(_AutoPeftModel):
    loader = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(_AutoPeftModel):
    loader = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(_AutoPeftModel):
    loader = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(_AutoPeftModel):
    loader = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(_AutoPeftModel):
    loader = "AutoModel"
